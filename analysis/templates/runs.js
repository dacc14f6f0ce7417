// The page of runs: its sections, from the data that the file carries.

(async () => {
  theme.start();
  const data = JSON.parse(await unpacked("packed-data"));
  const drawn = new Set(data.drawn);
  const state = { metric: data.metric, eachRun: false, logValues: false, logEpochs: false };
  const redraw = [];
  byId("main").replaceChildren();
  overview(data);
  const told = settingsSection(data, drawn, state, () => redraw.forEach((one) => one()));
  redraw.push(curvesSection(data, drawn, state), runsSection(data, drawn, state));
  state.changedMetric = () => {
    told();
    redraw.forEach((one) => one());
  };
  if (data.layers.runs.length) {
    new Watched(
      data,
      data.layers,
      "layers",
      "Layers",
      "What rounding lost, by layer and step. Choose a cell to see its exponents and its curve.",
      true,
    );
  }
  if (data.shadow.runs.length) {
    new Watched(
      data,
      data.shadow,
      "shadow",
      "Shadow",
      "The same training in float32 beside the run, with the same data and initial weights.",
      false,
    );
  }
  section(
    "about",
    "About this page",
    el(
      "p",
      {},
      `Made by report.py from records; it needs no network. Numbers have four significant digits here, three of layers, and all of them in the records.`,
    ),
    el(
      "p",
      {},
      "By keyboard: ",
      el("kbd", {}, "Tab"),
      " goes from control to control and from chart to chart. In a chart, ",
      KEYS,
    ),
  );
  document.body.dataset.ready = "true";
  let width = innerWidth;
  addEventListener("resize", () => {
    // names are cut to the width
    if (innerWidth !== width) charts.all.forEach((chart) => chart.changed());
    width = innerWidth;
  });
  // The text is painted first.
  requestAnimationFrame(() => setTimeout(() => plotly.load(), 0));
})();
