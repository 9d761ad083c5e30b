// A formula or table wider than the page scrolls inside itself; without a tab stop a keyboard could not reach its end.
(function () {
  "use strict";
  const update = (box) => {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  };
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target)));
  document
    .querySelectorAll("div.math, div.cell_output pre, .pst-scrollable-table-container, div.cell_output .text_html")
    .forEach((box) => watch.observe(box));
})();
