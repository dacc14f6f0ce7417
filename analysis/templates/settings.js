// What the runs are: settings, what differs between them, and what each came to.

const shownValue = (data, metric) => {
  const isPercent = data.metrics.find((one) => one.name === metric).percent;
  return (value, digits = 4) => (isPercent ? percent(value, digits) : number(value, digits));
};

const statusText = (data) => data.statuses.map(([name, count]) => `${count} ${name}`).join(", ");

function overview(data) {
  const unfinished = data.statuses.filter(([name]) => !["complete", "diverged"].includes(name));
  const codes = data.codes
    .map(([code, count]) => `${count} ${code ? `by ${code}` : "without a fingerprint"}`)
    .join(", ");
  const count = data.runs.seeds.length;
  byId("main").append(
    ...[
      el("h1", {}, data.title),
      el(
        "p",
        {},
        `${data.settings.length} ${data.settings.length === 1 ? "setting" : "settings"}, ${count} ${count === 1 ? "run" : "runs"}: ${statusText(data)}.`,
      ),
      unfinished.length
        ? el(
            "p",
            { class: "warn" },
            "Runs that have not ended by themselves are in the curves as far as they came; the table of settings leaves them out.",
          )
        : null,
      data.codes.length > 1 ? el("p", { class: "warn" }, `These runs were made by different code: ${codes}.`) : null,
      data.common.length ? el("p", {}, "In all runs: ", el("code", {}, data.common.join(" "))) : null,
    ].filter(Boolean),
  );
}

/** The table of settings; `drawn` is the set of those that are drawn, changed() is called when it changes. */
function settingsSection(data, drawn, state, changed) {
  const rows = data.settings.map((setting, index) => ({ ...setting, index }));
  const of = (row) => data.table[state.metric][row.index];
  const show = () => shownValue(data, state.metric);
  const isPercent = () => data.metrics.find((one) => one.name === state.metric).percent;
  const change = (value) => {
    if (value === null) return "–";
    const text = isPercent() ? number(100 * value, 3) : number(value, 3);
    return value > 0 ? `+${text}` : text.replace("-", "−");
  };
  const box = (row) =>
    el("input", {
      type: "checkbox",
      checked: drawn.has(row.index),
      "aria-label": `draw ${row.name}`,
      onchange: (event) => {
        if (event.target.checked) drawn.add(row.index);
        else drawn.delete(row.index);
        changed();
      },
    });
  const epochs = (row) => [...new Set(row.runs.map((run) => data.runs.epochs[run]))].sort((a, b) => a - b);
  const columns = [
    {
      title: "drawn",
      kind: "short",
      cell: (row) => el("label", {}, box(row), " ", swatch(row.index)),
      value: (row) => (drawn.has(row.index) ? 0 : 1),
    },
    { title: "what is rounded", kind: "text name", cell: (row) => row.name, value: (row) => row.name },
    ...data.columns.map((flag, i) => ({
      title: flag,
      kind: "text",
      cell: (row) => row.cells[i] || "–",
      value: (row) =>
        row.cells[i] !== "" && !Number.isNaN(Number(row.cells[i])) ? Number(row.cells[i]) : row.cells[i],
    })),
    {
      title: "runs",
      kind: "number",
      cell: (row) => String(row.runs.length) + (of(row)[9] ? ` (${of(row)[9]} diverged)` : ""),
      value: (row) => row.runs.length,
    },
    {
      title: data.units,
      kind: "number",
      cell: (row) => {
        const all = epochs(row);
        return all.length > 1 ? `${all[0]}-${all.at(-1)}` : String(all[0]);
      },
      value: (row) => epochs(row).at(-1),
    },
    { title: "median", kind: "number", cell: (row) => show()(of(row)[0]), value: (row) => of(row)[0] },
    {
      title: "5th to 95th percentile",
      kind: "number",
      cell: (row) => (of(row)[3] > 1 ? `${show()(of(row)[1])} to ${show()(of(row)[2])}` : "–"),
      value: (row) => of(row)[2] - of(row)[1],
    },
  ];
  if (Object.values(data.table).some((lines) => lines.some((line) => line[8]))) {
    const interval = (row) => (of(row)[5] === null ? "" : ` [${change(of(row)[5])}, ${change(of(row)[6])}]`);
    columns.push(
      {
        title: "mean difference to float32 [95 % interval]",
        kind: "number wide",
        cell: (row) => change(of(row)[4]) + interval(row),
        value: (row) => of(row)[4],
      },
      { title: "its median", kind: "number", cell: (row) => change(of(row)[7]), value: (row) => of(row)[7] },
      { title: "pairs", kind: "number", cell: (row) => String(of(row)[8] || "–"), value: (row) => of(row)[8] },
    );
  }
  const table = new Table(
    "settings-table",
    "Settings, what differs between them, and their last values",
    columns,
    rows,
    { textOf: (row) => `${row.name} ${row.flags}` },
  );
  const MOST = 28; // looks that can be told apart
  const draw = (chosen) => {
    drawn.clear();
    for (const index of chosen) drawn.add(index);
    table.draw();
    changed();
  };
  table.controls.append(
    el(
      "button",
      {
        type: "button",
        onclick: () =>
          draw(
            table
              .listed()
              .slice(0, MOST)
              .map((row) => row.index),
          ),
      },
      `Draw what is listed (at most ${MOST})`,
    ),
    el("button", { type: "button", onclick: () => draw([]) }, "Draw none"),
  );
  const note = el("p", { class: "faint" });
  const told = () => {
    const name = data.metrics.find((one) => one.name === state.metric).label;
    note.textContent =
      `Last values of ${name}. A setting is all runs that differ in their seeds alone. Differences are taken in pairs of runs of the same seed` +
      `${isPercent() ? ", in points" : ""}${state.metric === data.metric ? "" : `; intervals are made for ${data.metric} alone`}.`;
    table.draw();
  };
  section("settings", "Settings", note, table.node);
  told();
  return told;
}
