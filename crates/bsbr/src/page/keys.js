"use strict";
// Arrow keys within everything that has rows and columns, and a line that says what is looked at.
(function () {
  for (const grid of document.querySelectorAll("[data-grid]")) {
    const cells = Array.from(grid.querySelectorAll("[data-r]"));
    if (cells.length === 0) { continue; }
    const readout = document.createElement("p");
    readout.className = "readout faint";
    readout.setAttribute("aria-hidden", "true");
    (grid.closest(".scroll") || grid).after(readout);
    const place = (cell) => [Number(cell.dataset.r), Number(cell.dataset.c)];
    const tell = (cell) => { readout.textContent = cell.getAttribute("aria-label"); };
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const from = event.target.closest("[data-r]");
      if (!step || !from) { return; }
      event.preventDefault();
      const [r, c] = place(from);
      let best = null, least = Infinity;
      for (const cell of cells) {
        const [row, column] = place(cell);
        const ahead = step[0] === 0 ? (column - c) * step[1] : (row - r) * step[0];
        const aside = step[0] === 0 ? Math.abs(row - r) : Math.abs(column - c);
        if (0 >= ahead || (step[0] === 0 ? aside > 0 : false)) { continue; }
        const far = ahead * 1000 + aside;
        if (least > far) { least = far; best = cell; }
      }
      if (!best) { return; }
      from.setAttribute("tabindex", "-1");
      best.setAttribute("tabindex", "0");
      best.focus();
    });
    for (const cell of cells) {
      cell.addEventListener("focus", () => tell(cell));
      cell.addEventListener("pointerenter", () => tell(cell));
    }
  }
})();
