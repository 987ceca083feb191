// Sorts the tables and draws the plots. Everything it needs is in the page: plotly.js and the numbers in #data.
"use strict";
const sheets = JSON.parse(document.getElementById("data").textContent);
const MARKS = { dense: "star", pruned: "circle", recovered: "diamond" };
const PALETTE = ["#0b6e99", "#d9730d", "#448361", "#c14c8a", "#9065b0", "#cb912f", "#2a9d8f", "#d44c47", "#6b8e23", "#5b7ec9", "#a0522d", "#20b2aa"];
const NEUTRAL = "#8a8f94"; // the dense model is no method
const drawn = [];
const waiting = [];

// Plotly reads its texts as HTML; what comes from results is to be shown as it is.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
}

function number(text) {
  const value = Number(text);
  return text === "" ? null : Number.isNaN(value) ? text : value;
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // absent values last, whatever the direction
  return typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
}

function sortBy(table, index) {
  const heads = table.tHead.rows[0].cells;
  const up = heads[index].getAttribute("aria-sort") !== "ascending";
  for (const th of heads) th.removeAttribute("aria-sort");
  heads[index].setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => number(row.cells[index].dataset.v);
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => (up || value(a) === null || value(b) === null ? 1 : -1) * compare(value(a), value(b)));
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll(".wide table")) {
  [...table.tHead.rows[0].cells].forEach((th, i) => th.firstChild.addEventListener("click", () => sortBy(table, i)));
}

function colours() {
  const css = getComputedStyle(document.documentElement);
  return { ink: css.getPropertyValue("--ink").trim(), line: css.getPropertyValue("--line").trim() };
}

function themed(layout) {
  const { ink, line } = colours();
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
    margin: { t: 36, r: 15, b: 45, l: 55 }, hoverlabel: { namelength: -1 }, legend: { orientation: "h", y: -0.22, font: { size: 10 } },
    title: { ...layout.title, font: { size: 13 }, x: 0.02, xanchor: "left" },
    xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
  };
}

function draw(place, traces, layout) {
  // Only the box now: a plot takes its size from the grid, which is settled once all boxes are in it.
  const box = document.createElement("div");
  place.append(box);
  waiting.push([box, traces, layout]);
}

function flush() {
  for (const [box, traces, layout] of waiting.splice(0)) {
    drawn.push([box, layout]);
    Plotly.newPlot(box, traces, themed(layout), { responsive: true, displayModeBar: false });
  }
}

// A method has one colour in every plot of its table; once the colours are used up, they begin anew.
function colourOf(sheet, label) {
  const labels = [...new Set(sheet.points.filter((p) => p.stage !== "dense").map((p) => p.label))];
  const place = labels.indexOf(label);
  return place < 0 ? NEUTRAL : PALETTE[place % PALETTE.length];
}

function method(label, stage) {
  return stage === "pruned" || stage === "dense" ? label || stage : `${label || "all"}, ${stage}`;
}

function quality(sheet, x, y) {
  const groups = {};
  for (const p of sheet.points) {
    if (p.values[x] == null || p.values[y] == null) continue;
    (groups[JSON.stringify([p.label, p.stage])] ||= []).push(p);
  }
  return Object.values(groups).map((points) => ({
    name: plain(method(points[0].label, points[0].stage)), mode: "markers", type: "scatter",
    marker: { symbol: MARKS[points[0].stage], size: 9, color: colourOf(sheet, points[0].stage === "dense" ? null : points[0].label) },
    x: points.map((p) => p.values[x]), y: points.map((p) => p.values[y]),
    error_y: { array: points.map((p) => p.spreads[y] || 0), thickness: 1 },
    text: points.map((p) => plain(p.label) + (p.target == null ? "" : ` ${Math.round(p.target * 100)} %`)),
    hovertemplate: `%{text}<br>%{x}, %{y}<extra>${points[0].stage}</extra>`,
  }));
}

function front(sheet, x, y, better) {
  // Points that no other beats both in cost and in quality.
  const points = sheet.points.filter((p) => p.values[x] != null && p.values[y] != null).map((p) => [p.values[x], p.values[y]]);
  points.sort((a, b) => a[0] - b[0] || better * (b[1] - a[1]));
  let best = null;
  const kept = points.filter(([, q]) => (best === null || better * (q - best) > 0 ? ((best = q), true) : false));
  return { name: "Pareto front", mode: "lines", type: "scatter", x: kept.map((p) => p[0]), y: kept.map((p) => p[1]), line: { dash: "dot", shape: "hv", color: NEUTRAL } };
}

function byRatio(sheet, y) {
  const lines = {};
  for (const p of sheet.points) {
    if (p.stage === "dense" || p.target == null || p.values[y] == null) continue;
    (lines[JSON.stringify([p.label, p.stage])] ||= []).push(p);
  }
  return Object.values(lines).filter((points) => points.length > 1).map((points) => {
    points.sort((a, b) => a.target - b.target);
    const { label, stage } = points[0];
    return {
      name: plain(method(label || "all", stage)), mode: "lines+markers", type: "scatter",
      x: points.map((p) => p.target), y: points.map((p) => p.values[y]), error_y: { array: points.map((p) => p.spreads[y] || 0), thickness: 1 },
      line: { color: colourOf(sheet, label), dash: stage === "recovered" ? "dash" : "solid" }, marker: { symbol: MARKS[stage] },
    };
  });
}

function scatters(place, sheet, metric) {
  place.replaceChildren();
  const scale = metric.key.startsWith("ppl_") && !metric.key.endsWith("_to_dense") ? { type: "log" } : {};
  const y = { title: { text: plain(metric.title) }, ...scale };
  const has = (key) => sheet.points.some((p) => p.values[key] != null && p.values[metric.key] != null);
  for (const [key, name] of [["params", "parameters (billions)"], ["prefill_ms", "prefill (ms)"], ["decode_ms_per_token", "decode (ms/token)"]]) {
    if (!has(key)) continue;
    const traces = [...quality(sheet, key, metric.key), front(sheet, key, metric.key, metric.better)];
    draw(place, traces, { title: { text: `${plain(metric.title)} against ${name}` }, xaxis: { title: { text: name } }, yaxis: y });
  }
  const lines = byRatio(sheet, metric.key);
  if (lines.length) draw(place, lines, { title: { text: `${plain(metric.title)} against the ratio asked for` }, xaxis: { title: { text: "ratio.target" }, tickformat: ".0%" }, yaxis: y });
}

function layers(place, title, grids, normalise) {
  for (const [kind, grid] of Object.entries(grids)) {
    const cells = normalise ? grid.cells.map((row) => { const top = Math.max(...row.filter((v) => v != null)); return row.map((v) => (v == null || !top ? v : v / top)); }) : grid.cells;
    const trace = { type: "heatmap", z: cells, y: grid.rows.map(plain), x: [...Array(grid.depth).keys()], zmin: 0, zmax: 1, colorscale: "Viridis", hoverongaps: false };
    draw(place, [trace], { title: { text: `${title}: ${plain(kind)}` }, xaxis: { title: { text: "layer" }, ...(grid.depth < 9 ? { dtick: 1 } : {}) }, yaxis: { autorange: "reversed", ticklabeloverflow: "hide past div" } });
  }
}

function curves(place, all) {
  if (!all.length) return;
  const traces = all.flatMap((c) => [["loss", "solid"], ["eval_loss", "dash"]].filter(([k]) => c[k].length).map(([k, dash]) => (
    { name: `${plain(c.label)} ${k === "loss" ? "training" : "held out"}`, mode: "lines", type: "scatter", x: c[k].map((p) => p[0]), y: c[k].map((p) => p[1]), line: { dash } })));
  draw(place, traces, { title: { text: "recovery" }, xaxis: { title: { text: "step" } }, yaxis: { title: { text: "loss" } } });
}

for (const place of document.querySelectorAll(".plots")) {
  const sheet = sheets[place.dataset.sheet];
  const metrics = sheet.metrics.filter((m) => m.quality);
  if (metrics.length) {
    const label = document.createElement("label");
    const select = document.createElement("select");
    const inner = document.createElement("div");
    select.append(...metrics.map((m, i) => new Option(m.title, i)));
    label.append("quality: ", select);
    inner.className = "plots";
    place.before(label, inner);
    select.addEventListener("change", () => { scatters(inner, sheet, metrics[select.value]); flush(); });
    scatters(inner, sheet, metrics[0]);
  }
  layers(place, "share of units kept (blank: nothing goes)", sheet.widths, false);
  layers(place, "importance, share of the row's highest", sheet.importance, true);
  curves(place, sheet.curves);
}
flush();

function retheme() {
  for (const [box, layout] of drawn) if (box.isConnected) Plotly.relayout(box, themed(layout));
}
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  retheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
