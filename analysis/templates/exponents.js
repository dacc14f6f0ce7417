// The exponents of one layer before rounding, over the range of its format.

const AROUND = 20; // powers of two on either side of the numbers: a wider range is cut there

/**
 * What Chart draws of a row of a watched run, and `words` on the range; null where no exponents were kept. They are
 * those of the kept step that is nearest to the chosen one.
 */
function exponentsChart(run, row, chosen) {
  const counts = row === null ? null : run.exponents.counts[row];
  if (!counts) return null;
  const distance = (i) => (counts[i] ? Math.abs(run.exponents.columns[i] - chosen) : Infinity);
  const kept = counts.map((_, i) => i).reduce((a, b) => (distance(b) < distance(a) ? b : a));
  const column = run.exponents.columns[kept];
  const [lowest, numbers] = counts[kept];
  const highest = lowest + numbers.length;
  const total = numbers.reduce((a, b) => a + b, 0) || 1;
  const { shapes, ends, words } = formatRange(run, row, column);
  const [from, to] = ends ?? [lowest, highest];
  const told = (count, i) =>
    `2<sup>${lowest + i}</sup> to 2<sup>${lowest + i + 1}</sup><br>${percent(count / total)} of the numbers (${count})`;
  const bars = {
    type: "bar",
    x: numbers.map((_, i) => lowest + i + 0.5),
    y: numbers.map((count) => (100 * count) / total),
    width: 0.92,
    marker: { color: colour("series-0"), opacity: 0.6 },
    text: numbers.map(told),
    textposition: "none",
    hovertemplate: "%{text}<extra></extra>",
  };
  const left = Math.max(Math.min(lowest, from) - 1, lowest - AROUND);
  const right = Math.min(Math.max(highest, to) + 1, highest + AROUND);
  const isCut = ends && (from < left || to > right);
  const title = `magnitude, base-2 logarithm; step ${run.steps[column]}`;
  return {
    traces: [bars],
    height: 340,
    words: words + (isCut ? " It goes beyond the chart." : ""),
    label: `Exponents before rounding at step ${run.steps[column]}`,
    layout: {
      shapes,
      bargap: 0,
      xaxis: { title: { text: title }, range: [left, right] },
      yaxis: { title: { text: "numbers (%)" }, rangemode: "tozero" },
    },
  };
}

/**
 * Bands for the format's normal and subnormal numbers, lines at its ends, and words for both; `ends` is null where
 * nobody knows the range. With scales the lower half has them with that step's smallest, the upper with its largest.
 */
function formatRange(run, row, column) {
  const range = run.ranges[run.rows[row][2]];
  const scale = (name) => {
    const value = run.values[name]?.[row]?.[column];
    return value > 0 ? Math.log2(value) : null;
  };
  const high = range?.scaled ? scale("scale_max") : 0;
  const zero = range?.scaled && scale("scale_min") === null; // that of a group of zeros
  const low = range?.scaled && !zero ? scale("scale_min") : high;
  if (!range || high === null) return { shapes: [], ends: null, words: "" };
  const shape = (x0, x1, y0, y1, others) => ({ x0, x1, y0, y1, yref: "paper", layer: "below", ...others });
  const band = (x0, x1, y0, y1, name) =>
    shape(x0, x1, y0, y1, { type: "rect", fillcolor: colour(name), line: { width: 0 } });
  const edge = (x, dash) =>
    shape(x, x, 0, 1, { type: "line", layer: "above", line: { color: colour("series-2"), width: 1.5, dash } });
  const bands = (by, y0, y1) => [
    band(range.lowest + by, range.normal + by, y0, y1, "subnormal"),
    band(range.normal + by, range.largest + by, y0, y1, "normal"),
  ];
  const ends = [range.lowest + low, range.largest + high];
  const one = low === high;
  const halves = one ? bands(low, 0, 1) : [...bands(low, 0, 0.5), ...bands(high, 0.5, 1)];
  let where = one ? "" : ", in the lower half with that step's smallest scale, in the upper half with its largest";
  if (zero) where = ", with that step's largest scale; its smallest is 0, of a group of zeros";
  const words = `The range of ${range.format}, from its smallest number (dotted line) to its largest (solid line)${where}.`;
  return { shapes: [...halves, edge(ends[0], "dot"), edge(ends[1], "solid")], ends, words };
}
