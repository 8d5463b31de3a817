"""How the HTML report looks, and the little that moves in it."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --sheet: #f5f6f8; --ink: #1c2026; --quiet: #5d6570; --line: #dce0e5;
  --accent: #1f61a8; --other: #c2541d; --good: #1d7a46; --bad: #b3321f; --wash: #e8f0f9; --bar: #cfe0f3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --sheet: #1c2026; --ink: #e6e9ed; --quiet: #9aa3ae; --line: #343a43;
    --accent: #6fb0f5; --other: #f0935b; --good: #5cc98c; --bad: #f0806f; --wash: #1d2c3d; --bar: #27415e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--sheet); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
header, main { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; }
header p { margin: 0; color: var(--quiet); }
h1 { margin: 0; font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 0 0 10px; font-size: 20px; overflow-wrap: anywhere; }
h3 { margin: 26px 0 8px; font-size: 16px; }
h4 { margin: 0 0 4px; font-size: 14px; color: var(--quiet); font-weight: 600; }
p { margin: 0 0 10px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin-top: 10px; }
a { color: var(--accent); overflow-wrap: anywhere; }
section {
  margin: 20px 0; padding: 20px 22px; background: var(--paper);
  border: 1px solid var(--line); border-radius: 10px;
}
.note { color: var(--other); margin: 10px 0 0; }
.scroll { overflow-x: auto; }
.tall { max-height: 480px; overflow-y: auto; border: 1px solid var(--line); border-radius: 6px; }
.paper { background: #fff; border-radius: 6px; }
.paper img { display: block; max-width: max(100%, 900px); height: auto; margin: 0 auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 12px; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom; }
tbody tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.main { font-weight: 700; background: var(--wash); }
th.main { background: var(--wash); color: var(--ink); }
.published { font-style: italic; color: var(--quiet); text-align: right; }
th.published { white-space: normal; font-size: 12px; font-weight: 500; line-height: 1.35; }
.published { padding: 5px 9px; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
.settings th { vertical-align: top; }
.sortable { width: 100%; }
.sortable th { position: sticky; top: 0; z-index: 1; padding: 0; background: var(--sheet); }
.sortable th button {
  width: 100%; padding: 7px 12px; border: 0; background: none; color: inherit; font: inherit;
  text-align: left; cursor: pointer; white-space: nowrap;
}
.sortable .number button { text-align: right; }
.index { width: 1%; color: var(--quiet); }
.sortable th button:hover { color: var(--ink); }
.sortable th[aria-sort] { color: var(--accent); }
.sortable th[aria-sort="ascending"] button::after { content: " \\2191"; }
.sortable th[aria-sort="descending"] button::after { content: " \\2193"; }
.sortable td { max-width: 340px; overflow: hidden; text-overflow: ellipsis; }
td.bar { position: relative; min-width: 92px; isolation: isolate; }
.bar i { position: absolute; z-index: -1; inset: 4px auto 4px 4px; width: calc(var(--share) * 0.92);
  background: var(--bar); border-radius: 2px; }
.tools { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; color: var(--quiet); font-size: 13px; }
input { padding: 5px 9px; border: 1px solid var(--line); border-radius: 6px; background: var(--paper);
  color: var(--ink); font: inherit; }
details { margin: 14px 0 0; }
summary { cursor: pointer; color: var(--accent); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 0; }
.tiles div { padding: 8px 14px; background: var(--sheet); border-radius: 8px; }
.tiles dt { color: var(--quiet); font-size: 12px; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 650; font-variant-numeric: tabular-nums; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 6px 30px; }
.columns ol { margin: 0 0 14px; padding-left: 26px; overflow-wrap: anywhere; }
.chart { margin: 0 0 14px; }
.chart svg { display: block; width: 100%; min-width: 620px; }
.chart output { display: block; min-height: 1.5em; color: var(--quiet); font-size: 13px; overflow-wrap: anywhere; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 16px; color: var(--quiet); font-size: 13px; margin: 0; }
.keys span::before { content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 6px;
  border-radius: 2px; background: var(--accent); }
.keys .unseen::before { background: var(--other); }
.keys .mean::before { height: 0; border-top: 2px dashed var(--ink); background: none; vertical-align: middle; }
svg .seen, svg .plain { fill: var(--accent); }
svg .unseen { fill: var(--other); }
svg .area { fill: transparent; }
svg g:hover .area { fill: var(--ink); fill-opacity: 0.1; }
svg .grid { stroke: var(--line); }
svg .mean { stroke: var(--ink); stroke-dasharray: 5 4; }
svg text { font-size: 11px; fill: var(--quiet); }
svg .axis, svg .name { text-anchor: end; }
.examples { display: grid; gap: 22px; }
figure { margin: 0; padding-top: 16px; border-top: 1px solid var(--line); }
figcaption { margin-bottom: 8px; overflow-wrap: anywhere; }
figcaption b { margin-right: 8px; text-transform: capitalize; }
.best { color: var(--good); }
.worst { color: var(--bad); }
code { margin-left: 8px; color: var(--quiet); font-size: 13px; }
.triple { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; max-width: 1180px; }
.triple img { display: block; width: 100%; height: auto; border-radius: 4px; }
.triple span { color: var(--quiet); font-size: 13px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0 0; padding: 0;
  list-style: none; font-size: 13px; }
.legend li { overflow-wrap: anywhere; }
.legend i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 3px;
  vertical-align: -1px; }
small { color: var(--quiet); font-size: inherit; }
@media (max-width: 640px) {
  header, main { padding: 0 10px; }
  header { padding-top: 16px; }
  section { padding: 14px 12px; }
  th, td, .sortable th button { padding-left: 7px; padding-right: 7px; }
  .sortable .index { display: none; }
  .sortable td { max-width: 150px; }
  .chart svg { min-width: 800px; }
  .chart svg text { font-size: 13px; }
  .triple { grid-template-columns: repeat(3, 76%); overflow-x: auto; scroll-snap-type: x proximity; }
  .triple div { scroll-snap-align: start; }
}
"""

SCRIPT = """
"use strict";
const key = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const rows = [...body.rows], numeric = rows.some((row) => row.cells[column].dataset.value);
    const first = numeric && column > 0 ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((each) => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((one, two) => {
      const a = key(one, column), b = key(two, column);
      if (!numeric) return sign * a.localeCompare(b);
      return a === "" || b === "" ? (a === "") - (b === "") : sign * (a - b);
    });
    body.append(...rows);
  }));
  table.closest("section").querySelector("input").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    for (const row of body.rows) row.hidden = !row.cells[1].textContent.toLowerCase().includes(wanted);
  });
}
for (const chart of document.querySelectorAll(".chart")) {
  const tell = (event) => {
    const bar = event.target.closest("g");
    if (bar) chart.querySelector("output").textContent = bar.dataset.name;
  };
  chart.addEventListener("pointerover", tell);
  chart.addEventListener("click", tell);
}
"""
