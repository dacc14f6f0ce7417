// Where the runs end: a chart, and the table of all runs with links to their records.

function runsSection(data, drawn, state) {
  const owner = [];
  data.settings.forEach((setting, index) =>
    setting.runs.forEach((run) => {
      owner[run] = index;
    }),
  );
  const rows = data.runs.seeds.map((_, run) => run);
  const { runs } = data;
  const status = (run) => runs.statuses[runs.status[run]];
  const value = (run) => runs.ends[state.metric][run];
  const link = (run) =>
    runs.folders[run]
      ? el("a", { href: runs.folders[run] }, decodeURIComponent(runs.folders[run].replace(/\/$/, "").split("/").at(-1)))
      : "from a CSV file";
  const columns = [
    {
      title: "what is rounded",
      kind: "text name",
      cell: (run) => el("span", {}, swatch(owner[run]), " ", data.settings[owner[run]].name),
      value: (run) => owner[run],
    },
    { title: "seed", kind: "number", cell: (run) => String(runs.seeds[run]), value: (run) => runs.seeds[run] },
    { title: "last value", kind: "number", cell: (run) => shownValue(data, state.metric)(value(run)), value },
    { title: "status", cell: status, value: status },
    {
      title: data.units,
      kind: "number",
      cell: (run) =>
        runs.epochs[run] < runs.of[run] ? `${runs.epochs[run]} of ${runs.of[run]}` : String(runs.epochs[run]),
      value: (run) => runs.epochs[run],
    },
    {
      title: "seconds",
      kind: "number",
      cell: (run) => number(runs.seconds[run], 3),
      value: (run) => runs.seconds[run],
    },
    { title: "record", kind: "short", cell: link, value: (run) => runs.folders[run] },
  ];
  if (runs.rounding_seeds.some((seed, i) => seed !== runs.seeds[i])) {
    columns.splice(2, 0, {
      title: "rounding seed",
      kind: "number",
      cell: (run) => String(runs.rounding_seeds[run]),
      value: (run) => runs.rounding_seeds[run],
    });
  }
  if (runs.remarks.length)
    columns.push({
      title: "remarks",
      kind: "text name",
      cell: (run) => runs.remarks[run].join(" "),
      value: (run) => runs.remarks[run].length,
    });
  const table = new Table("runs-table", "All runs", columns, rows, {
    most: 25,
    textOf: (run) =>
      `${data.settings[owner[run]].name} seed ${runs.seeds[run]} ${status(run)} ${runs.folders[run]} ${(runs.remarks[run] ?? []).join(" ")}`,
  });
  const chart = new Chart("Where the runs end", () => endsChart(data, drawn, state, status));
  state.pickRun = (run) => {
    table.mark(run);
    said(`marked in the table of runs: ${data.settings[owner[run]].name}, seed ${runs.seeds[run]}`);
  };
  section(
    "runs",
    "Runs",
    el(
      "p",
      { class: "faint" },
      "Where the runs of the drawn settings end: a dot is a run (a ring: it has not ended), a line the median. Choose a dot to find its record in the table.",
    ),
    chart.node,
    table.node,
  );
  return () => {
    chart.changed();
    table.draw();
  };
}

/** A row for each drawn setting, a dot for each run. */
function endsChart(data, drawn, state, status) {
  const show = shownValue(data, state.metric);
  const { label, percent: isPercent } = data.metrics.find((one) => one.name === state.metric);
  const chosen = [...drawn].sort((a, b) => a - b);
  if (!chosen.length) return null;
  const traces = [];
  const annotations = [];
  const shapes = [];
  const letters = Math.max(20, Math.floor((byId("main").clientWidth - 40) / 7.5));
  chosen.forEach((index, place) => {
    const y = -place;
    const { colour: hue } = look(index);
    const values = data.runs.ends[state.metric];
    const all = data.settings[index].runs;
    const there = all.filter((run) => values[run] !== null);
    const missing = all.length - there.length;
    const name = shortened(data.settings[index].name, letters) + (missing ? ` (${missing} without a value)` : "");
    annotations.push({
      text: plain(name),
      x: 0,
      xref: "paper",
      xanchor: "left",
      y: y + 0.33,
      yanchor: "middle",
      showarrow: false,
      bgcolor: colour("back"), // no line of the grid goes through a name
    });
    const spread = Math.min(0.16, there.length * 0.02);
    traces.push({
      x: there.map((run) => values[run] * (isPercent ? 100 : 1)),
      mode: "markers",
      hovertemplate: "%{text}<extra></extra>",
      runs: there,
      y: there.map((_, k) => y - 0.1 + spread * Math.sin(2.4 * k)), // apart, and in the same places each time
      marker: {
        color: hue,
        size: 8,
        symbol: there.map((run) => (["complete", "diverged"].includes(status(run)) ? "circle" : "circle-open")),
        opacity: there.length > 20 ? 0.6 : 0.9,
      },
      text: there.map(
        (run) =>
          `<b>${plain(data.settings[index].name)}</b><br>seed ${data.runs.seeds[run]}: ${show(values[run])}<br>${status(run)}`,
      ),
    });
    const median = data.table[state.metric][index][0];
    if (median !== null && there.length > 1) {
      const x = median * (isPercent ? 100 : 1);
      shapes.push({ type: "line", x0: x, x1: x, y0: y - 0.33, y1: y + 0.13, line: { color: hue, width: 3 } });
    }
  });
  return {
    traces,
    height: 60 * chosen.length + 90,
    label: `${label}, last values`,
    layout: {
      annotations,
      shapes,
      xaxis: { title: { text: plain(label) }, type: state.logValues ? "log" : "linear" },
      yaxis: { visible: false, range: [-chosen.length + 0.4, 0.65], fixedrange: true },
    },
    pick: (trace, point) => state.pickRun(traces[trace].runs[point]),
  };
}
