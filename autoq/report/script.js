"use strict";
// What a mark or a cell says when it is touched, pointed at or focused. Everything it says also stands in a table.
(() => {
  const panels = JSON.parse(document.getElementById("tips")?.textContent ?? "[]");
  const tip = document.getElementById("tip");

  const show = (lines, x, y) => {
    tip.textContent = lines;
    tip.hidden = false;
    const room = document.documentElement;
    const left = Math.min(Math.max(8, x + 14), room.clientWidth - tip.offsetWidth - 8);
    const below = y + 18 + tip.offsetHeight < room.clientHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${Math.max(8, below ? y + 18 : y - tip.offsetHeight - 14)}px`;
  };
  const hide = () => { tip.hidden = true; };

  // A cell's text, by where in its panel the pointer is.
  const cell = (panel, event) => {
    const drawn = panel.querySelector("svg.cells");
    const box = drawn.getBoundingClientRect();
    const one = panels[panel.dataset.panel];
    const unit = drawn.viewBox.baseVal.width / box.width;
    const column = Math.floor(((event.clientX - box.left) * unit - one.x) / one.w);
    const row = Math.floor(((event.clientY - box.top) * unit - one.y) / one.h);
    return one.t[row]?.[column] ?? "";
  };

  const over = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    const panel = mark ? null : event.target.closest?.("[data-panel]");
    const lines = mark ? mark.dataset.tip : panel ? cell(panel, event) : "";
    if (lines) show(lines, event.clientX, event.clientY); else hide();
  };
  for (const kind of ["pointermove", "pointerdown"]) document.addEventListener(kind, over);
  // Moving to a mark by keyboard scrolls it into view; only other scrolling ends what it says.
  const marked = () => document.activeElement?.matches("[data-tip]:focus-visible");
  document.addEventListener("scroll", () => { if (!marked()) hide(); }, { passive: true });
  // A finger leaves when it is lifted; what it touched stays to be read.
  document.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("focusin", (event) => {
    const mark = event.target.closest?.("[data-tip]");
    if (!mark || !mark.matches(":focus-visible")) return;
    const box = mark.getBoundingClientRect();
    show(mark.dataset.tip, box.right, box.bottom);
  });
  addEventListener("beforeprint", hide);
})();
