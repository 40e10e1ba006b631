// Makes claims tables readable on a phone and by keyboard, and adds the filter to the scoreboard. Everything here
// works on the page's own tables; without it they are all there, in full.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const scored = [...document.querySelectorAll("#the-scoreboard table")].filter((t) => t.querySelector("td .verdict"));
  [...scored, ...document.querySelectorAll("table.ledger, table.claims")].forEach((table) => labelCells(table, "as-cards"));
  if (scored.length) addFilter(scored);
  // Tables of totals: beside the chapter's title, a column for each verdict.
  for (const table of document.querySelectorAll(".bd-article table.table")) {
    if (table.tHead?.rows[0].cells[1]?.textContent.trim() !== "reproduced") continue;
    labelCells(table, "as-totals");
  }
  document.querySelectorAll(".ledger-scroll").forEach(reachByKeyboard);
});

// A box that scrolls sideways takes the focus, so that the arrow keys scroll it; the theme does so for all others.
function reachByKeyboard(box) {
  if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
}

// Each cell learns the head of its column: on a narrow screen a row becomes a card, and each cell says what it is.
function labelCells(table, kind) {
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  table.classList.add(kind);
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => (cell.dataset.head = heads[i]));
  }
}

function addFilter(tables) {
  const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);
  const { form, query, boxes, status } = buildForm(rows);
  const first = tables[0].closest("section");
  first.parentElement.insertBefore(form, first);
  const show = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      const text = (row.closest("section").querySelector("h2").textContent + " " + row.textContent).toLowerCase();
      const keep = wanted.has(verdictOf(row)) && words.every((word) => text.includes(word));
      row.classList.toggle("is-filtered-out", !keep);
      shown += keep;
    }
    for (const table of tables) {
      const empty = [...table.tBodies[0].rows].every((row) => row.classList.contains("is-filtered-out"));
      table.closest("section").classList.toggle("is-filtered-out", empty);
    }
    status.textContent = `${shown} of ${rows.length} claims shown`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}

// "✓ reproduced" -> "reproduced"
function verdictOf(row) {
  return row.querySelector(".verdict").textContent.replace(/^\S+\s/, "").trim();
}

function buildForm(rows) {
  const form = document.createElement("form");
  form.className = "scoreboard-filter";
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter the claims");
  form.innerHTML = `
    <div><label for="claim-query">Words in the claim, the paper's figure or the chapter</label>
    <input type="search" id="claim-query" autocomplete="off"></div>
    <fieldset><legend class="visually-hidden">Verdicts to show</legend></fieldset>
    <p role="status"></p>`;
  const counts = new Map();
  for (const row of rows) counts.set(verdictOf(row), (counts.get(verdictOf(row)) || 0) + 1);
  const boxes = ["reproduced", "direction only", "not reproduced", "untested"].map((verdict) => {
    const label = document.createElement("label");
    label.innerHTML = `<input type="checkbox" name="verdict" checked> ${verdict} (${counts.get(verdict) || 0})`;
    form.querySelector("fieldset").append(label);
    const box = label.querySelector("input");
    box.value = verdict;
    return box;
  });
  return { form, boxes, query: form.querySelector("input[type=search]"), status: form.querySelector("[role=status]") };
}
