// The scoreboard's filter. It reads the page's own tables; without it they are all there, unfiltered.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const page = document.getElementById("the-scoreboard");
  if (!page) return;
  const tables = [...page.querySelectorAll("table")].filter((table) => table.querySelector("td .verdict"));
  if (!tables.length) return;
  const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);
  tables.forEach(labelCells);

  const { form, query, boxes, status } = buildForm(rows);
  page.insertBefore(form, tables[0].closest("section"));
  const show = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let shown = 0;
    for (const row of rows) {
      const text = (row.textContent + " " + row.closest("section").querySelector("h2").textContent).toLowerCase();
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
  form.addEventListener("reset", () => setTimeout(show));
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
});

// "✓ reproduced" -> "reproduced"
function verdictOf(row) {
  return row.querySelector(".verdict").textContent.replace(/^\S+\s/, "").trim();
}

function labelCells(table) {
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  table.classList.add("scoreboard-cards");
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => (cell.dataset.head = heads[i]));
  }
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
