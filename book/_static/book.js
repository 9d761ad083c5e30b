// A formula, table or output wider than the page scrolls inside itself; without a tab stop a keyboard could not reach
// its end. Formulas are typeset when they come into view, which changes their size, so sizes are watched.
(function () {
  "use strict";
  const update = (box) => {
    const scroller = box.querySelector("mjx-container") || box;
    if (scroller.scrollWidth > scroller.clientWidth + 1) scroller.tabIndex = 0;
    else scroller.removeAttribute("tabindex");
  };
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target)));
  document
    .querySelectorAll("div.math, div.cell_output pre, .pst-scrollable-table-container, div.cell_output .text_html")
    .forEach((box) => watch.observe(box));
})();
