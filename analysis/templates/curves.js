// Curves by epoch or step, with bands.

/** The legend of what is drawn; it names what has no value of the metric, too. */
function legend(data, drawn, state) {
  const made = el("ul", { class: "legend", "aria-label": "What is drawn" });
  const without = (index) => (data.curves.settings[index].metrics[state.metric] ? "" : " (no value)");
  made.fill = () =>
    made.replaceChildren(
      ...[...drawn]
        .sort((a, b) => a - b)
        .map((index) => el("li", {}, swatch(index), el("span", {}, data.settings[index].name + without(index)))),
    );
  made.fill();
  return made;
}

function curvesSection(data, drawn, state) {
  const chart = new Chart(`Curves by ${data.unit}`, () => {
    const show = shownValue(data, state.metric);
    const { label, percent: isPercent } = data.metrics.find((one) => one.name === state.metric);
    const traces = [];
    for (const index of [...drawn].sort((a, b) => a - b)) {
      const curves = data.curves.settings[index];
      const metric = curves.metrics[state.metric];
      if (metric) traces.push(...curveTraces(data, index, curves.epochs, metric, state, show, isPercent ? 100 : 1));
    }
    // No tick is at half a one, where each of them is whole.
    const few =
      !state.logEpochs && traces.every(({ x }) => x.every((place) => place <= 10 && Number.isInteger(place)));
    return {
      traces,
      height: 430,
      label: `${label} by ${data.unit}`,
      layout: {
        xaxis: { title: { text: data.unit }, type: state.logEpochs ? "log" : "linear", ...(few && { dtick: 1 }) },
        yaxis: { title: { text: plain(label) }, type: state.logValues ? "log" : "linear" },
      },
      pick: (trace) => traces[trace].picks !== undefined && state.pickRun(traces[trace].picks),
    };
  });
  const list = legend(data, drawn, state);
  const redraw = () => {
    list.fill();
    chart.changed();
  };
  const fewer = data.curves.settings.filter((one) => one.epochs.length < one.of);
  section(
    "curves",
    "Curves",
    el(
      "div",
      { class: "controls" },
      select(
        "Metric",
        "metric",
        data.metrics.map((one) => [one.name, one.label]),
        state.metric,
        (value) => {
          state.metric = value;
          state.changedMetric();
        },
      ),
      checkbox("each run", "each-run", state.eachRun, (on) => {
        state.eachRun = on;
        redraw();
      }),
      checkbox("logarithmic values", "log-values", state.logValues, (on) => {
        state.logValues = on;
        redraw();
      }),
      checkbox(`logarithmic ${data.unit}s`, "log-epochs", state.logEpochs, (on) => {
        state.logEpochs = on;
        redraw();
      }),
    ),
    chart.node,
    list,
    el(
      "p",
      { class: "faint" },
      "A line is the median over a setting's runs, a band goes from the 5th to the 95th percentile of those that came so far.",
      fewer.length
        ? ` Of ${Math.max(...fewer.map((one) => one.of))} evaluations, ${fewer[0].epochs.length} are drawn.`
        : "",
    ),
  );
  return redraw;
}

function curveTraces(data, index, epochs, metric, state, show, times) {
  const { colour: hue, dash } = look(index);
  const name = plain(data.settings[index].name);
  const there = (values) => epochs.map((_, i) => i).filter((i) => values[i] !== null);
  const at = (places, values) => places.map((i) => values[i] * times);
  const traces = [];
  const lines = metric.median && !state.eachRun ? [] : metric.runs;
  lines.forEach((values, k) => {
    const places = there(values);
    const run = data.settings[index].runs[k];
    traces.push({
      x: places.map((i) => epochs[i]),
      y: at(places, values),
      mode: places.length > 1 ? "lines" : "markers",
      line: { color: hue, dash, width: lines.length > 1 ? 1 : 2.2 },
      opacity: lines.length > 3 ? 0.65 : 1,
      picks: run,
      hovertemplate: "%{text}<extra></extra>",
      text: places.map(
        (i) => `<b>${name}</b><br>seed ${data.runs.seeds[run]}<br>${data.unit} ${epochs[i]}: ${show(values[i])}`,
      ),
    });
  });
  if (metric.median && !state.eachRun) {
    const places = there(metric.median);
    const x = places.map((i) => epochs[i]);
    const edge = { x, mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
    traces.push(
      { ...edge, y: at(places, metric.low) },
      { ...edge, y: at(places, metric.high), fill: "tonexty", fillcolor: faded(hue, 0.16) },
      {
        x,
        y: at(places, metric.median),
        mode: places.length > 1 ? "lines" : "markers",
        line: { color: hue, dash, width: 2.4 },
        hovertemplate: "%{text}<extra></extra>",
        text: places.map(
          (i) =>
            `<b>${name}</b><br>${data.unit} ${epochs[i]}: ${show(metric.median[i])}<br>5 to 95 %: ${show(metric.low[i])} to ${show(metric.high[i])}<br>${metric.number[i]} of ${metric.runs.length} runs`,
        ),
      },
    );
  }
  return traces;
}
