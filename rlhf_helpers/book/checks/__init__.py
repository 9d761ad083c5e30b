"""The exercises check themselves: the checks of each chapter are a file with its name."""
