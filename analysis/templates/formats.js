// The page of number formats: facts, number lines, errors by magnitude, groups that share a scale.

/** 448 is 1.75 · 2^8: the mantissa and the exponent of a number, exact. */
function parts(value) {
  let exponent = Math.floor(Math.log2(Math.abs(value)));
  let mantissa = Math.abs(value) / 2 ** exponent;
  if (exponent < -1022) mantissa = (Math.abs(value) * 2 ** 200) / 2 ** (exponent + 200); // 2 ** exponent has few bits
  if (mantissa >= 2) [mantissa, exponent] = [mantissa / 2, exponent + 1];
  if (mantissa < 1) [mantissa, exponent] = [mantissa * 2, exponent - 1];
  return [mantissa, exponent];
}

const superscript = (n) => String(n).replace(/./g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)]));

/** As a power of two times few digits; empty where it is none. */
function asPower(value) {
  if (value === 0) return "";
  const [mantissa, exponent] = parts(value);
  if ((mantissa * 2 ** 12) % 1) return "";
  return `${value < 0 ? "−" : ""}${mantissa === 1 ? "" : `${mantissa} · `}2${superscript(exponent)}`;
}

/** A value of a format, in full where that is short. */
function exact(value) {
  const short = String(Number(value.toPrecision(10)));
  return Number(short) === value && short.length < 14 ? short : number(value, 7);
}

function named(value) {
  const power = asPower(value);
  return power && power !== exact(value) ? `${exact(value)} = ${power}` : exact(value);
}

const ROW_HEIGHT = 46;
const MARK = 0.22; // half of a mark's height, in rows

class Formats {
  constructor(data) {
    Object.assign(this, { data, group: 0, axis: "own", reach: "all" });
    this.hasGroups = data.formats.some((format) => format.isGroup);
    this.line = new Chart("Values on the number line", () => this.numberLine());
    this.errors = new Chart("Relative error by magnitude", () => this.errorCurves());
    this.overview();
    this.facts();
    this.lines();
    this.curves();
    if (this.hasGroups) this.groups();
    this.about();
  }

  shown(format) {
    return format.shown[format.isGroup ? this.group : 0];
  }

  /** The name beside a row; of a group, whose largest magnitude it has. */
  label(format, apart = "<br>") {
    const name = plain(shortened(format.name, innerWidth < 640 ? 16 : 34));
    return format.isGroup ? `${name}${apart}(${format.by} ${this.data.amaxes[this.group][1]})` : name;
  }

  overview() {
    byId("main").append(
      el("h1", {}, this.data.title),
      el(
        "p",
        {},
        "What these formats can hold, and how far rounding to them goes wrong.",
        this.hasGroups ? " Of a format with scales, a group of numbers is shown: those that share one." : "",
      ),
      this.legend(),
    );
  }

  legend() {
    return el(
      "ul",
      { class: "legend", "aria-label": "Formats" },
      ...this.data.formats.map((format, i) =>
        el("li", {}, swatch(i), el("span", {}, `${format.rule} (${format.bits})`)),
      ),
    );
  }

  facts() {
    const head = el(
      "tr",
      {},
      el("td", {}),
      ...this.data.formats.map((format) => el("th", { scope: "col", class: "text" }, format.name)),
    );
    const rows = this.data.facts.map(([name, ...texts]) =>
      el("tr", {}, el("th", { scope: "row", class: "short" }, name), ...texts.map((text) => el("td", { class: "text" }, text || "–"))),
    );
    const note = "Of a format with scales, the rows from the finite values to the special ones are those of an element.";
    section(
      "facts",
      "Range",
      el(
        "div",
        { class: "scroll", tabindex: 0, role: "region", "aria-label": "Range" },
        el(
          "table",
          { id: "facts-table" },
          el("caption", { class: "only-heard" }, "Range"),
          el("thead", {}, head),
          el("tbody", {}, ...rows),
        ),
      ),
      this.hasGroups ? el("p", { class: "faint" }, note) : null,
    );
  }

  redraw() {
    this.line.changed();
    this.errors.changed();
  }

  lines() {
    const scales = [
      ["own", "each over its largest"],
      ["same", "the same for all"],
      ["powers", "powers of two, above zero"],
    ];
    const controls = el(
      "div",
      { class: "controls" },
      select("Axis", "axis", scales, this.axis, (value) => {
        this.axis = value;
        this.line.changed();
      }),
      this.groupSelect("line-group"),
    );
    const hidden = this.data.formats.filter((format) => this.shown(format).hidden);
    section(
      "line",
      "Number line",
      controls,
      this.line.node,
      hidden.length
        ? el("p", { class: "faint" }, `Of ${hidden.map((one) => one.name).join(", ")}, values that lie too close to be told apart here are left out.`)
        : null,
    );
  }

  /** One choice, which stands at both charts. */
  groupSelect(id) {
    if (!this.hasGroups) return null;
    const options = this.data.amaxes.map(([, text], i) => [i, text]);
    return select("Largest magnitude of a group", id, options, this.group, (value) => {
      this.group = Number(value);
      for (const other of ["line-group", "errors-group"]) if (byId(other)) byId(other).value = value;
      this.redraw();
    });
  }

  numberLine() {
    const { formats } = this.data;
    const last = formats.length - 1;
    const traces = formats.map((format, i) => {
      const { values, codes, scale } = this.shown(format);
      const largest = Math.max(...values.map(Math.abs)) || 1;
      const places = values.map((_, k) => k).filter((k) => this.axis !== "powers" || values[k] > 0);
      return {
        x: places.map((k) => (this.axis === "own" ? values[k] / largest : values[k])),
        y: places.map(() => last - i),
        mode: "markers",
        marker: { size: 1, opacity: 0 }, // marks are below; of two that are within its size, plotly reads either
        hovertemplate: "%{text}",
        text: places.map((k) => this.valueText(format, values, k, codes, scale)),
      };
    });
    const marks = traces.map(({ x }, i) => ({
      x: x.flatMap((value) => [value, value, null]),
      y: x.flatMap(() => [last - i - MARK, last - i + MARK, null]),
      mode: "lines",
      line: { width: x.length > 300 ? 1 : 1.6, color: look(i).colour, simplify: false },
      hoverinfo: "skip",
    }));
    const titles = { own: "value / largest magnitude", same: "value", powers: "value" };
    return {
      traces: [...traces, ...marks],
      height: 110 + ROW_HEIGHT * formats.length,
      label: `Values of ${formats.map((format) => format.name).join(", ")}`,
      layout: {
        xaxis: { title: { text: titles[this.axis] }, zeroline: false, ...(this.axis === "powers" ? this.powers(traces) : {}) },
        yaxis: {
          tickvals: formats.map((_, i) => last - i),
          ticktext: formats.map((format) => this.label(format)),
          range: [-0.6, last + 0.6],
          showgrid: false,
          zeroline: false,
          fixedrange: true,
        },
      },
    };
  }

  valueText(format, values, place, codes, scale) {
    const value = values[place];
    const lines = [`<b>${plain(format.name)}</b>`, named(value)];
    if (codes) lines.push(`bits ${codes[place]}`);
    if (scale !== null && scale !== 0 && !format.rule.includes("expand")) lines.push(`element ${number(value / scale, 6)}`);
    const hidden = this.shown(format).hidden > 0;
    if (place + 1 < values.length && !hidden) lines.push(`to the next ${named(values[place + 1] - value)}`);
    return lines.join("<br>");
  }

  /** A logarithmic axis whose ticks are powers of two, a dozen of them at most. */
  powers(traces) {
    const all = traces.flatMap((trace) => trace.x).filter((x) => x > 0);
    if (!all.length) return {};
    const low = Math.floor(Math.log2(Math.min(...all)));
    const high = Math.ceil(Math.log2(Math.max(...all)));
    const most = innerWidth < 640 ? 6 : 12;
    const step = [1, 2, 4, 8, 16, 32, 64, 128, 256].find((each) => (high - low) / each <= most) ?? 512;
    const ticks = [];
    for (let power = Math.ceil(low / step) * step; power <= high; power += step) ticks.push(power);
    const room = Math.max((high - low) * 0.02, 0.3);
    return {
      type: "log",
      range: [(low - room) * Math.log10(2), (high + room) * Math.log10(2)],
      tickvals: ticks.map((power) => 2 ** power),
      ticktext: ticks.map((power) => `2${superscript(power)}`),
    };
  }

  curves() {
    section(
      "errors",
      "Relative error",
      el("div", { class: "controls" }, this.reachSelect(), this.groupSelect("errors-group")),
      this.errors.node,
      this.legend(),
      el(
        "p",
        { class: "faint" },
        "Between two neighbouring values, the number that rounding moves most; of stochastic rounding, the one whose expected error is largest. Beyond the largest value a number becomes that one.",
      ),
    );
  }

  /** Beside a format of many powers of two, one of few is a dot: its own magnitudes may fill the chart. */
  reachSelect() {
    const { formats } = this.data;
    if (formats.length < 2) return null;
    const options = [["all", "all"], ...formats.map((format, i) => [i, `those of ${format.name}`])];
    return select("Magnitudes", "reach", options, this.reach, (value) => {
      this.reach = value;
      this.errors.changed();
    });
  }

  errorCurves() {
    const traces = this.data.formats.map((format, i) => {
      const points = this.shown(format).curve.filter(([, error]) => error > 0);
      return {
        x: points.map(([x]) => x),
        y: points.map(([, error]) => 100 * error),
        mode: points.length > 1 ? "lines" : "markers",
        line: { color: look(i).colour, dash: look(i).dash, width: 2.2 },
        hovertemplate: "%{text}",
        text: points.map(
          ([x, error]) => `<b>${plain(format.rule)}</b><br>at ${named(x)}<br>${format.error} ${percent(error)}`,
        ),
      };
    });
    return {
      traces,
      height: 430,
      layout: {
        xaxis: {
          title: { text: "magnitude of the number" },
          ...this.powers(this.reach === "all" ? traces : [traces[this.reach]]),
        },
        yaxis: { title: { text: "relative error" }, type: "log", ...this.percents(traces) },
      },
    };
  }

  percents(traces) {
    const all = traces.flatMap((trace) => trace.y);
    const low = Math.floor(Math.log10(Math.min(...all, 10)));
    const high = Math.ceil(Math.log10(Math.max(...all, 100)));
    const ticks = [];
    for (let power = low; power <= high; power++)
      ticks.push(...(high - low > 2 ? [1] : [1, 2, 5]).map((digit) => digit * 10 ** power));
    return { tickvals: ticks, ticktext: ticks.map((share) => `${number(share)} %`) };
  }

  groups() {
    const tables = this.data.formats
      .filter((format) => format.isGroup)
      .flatMap((format) => {
        const [head, ...rows] = format.groups;
        return [
          el("h3", {}, format.rule),
          el(
            "div",
            { class: "scroll", tabindex: 0, role: "region", "aria-label": `Groups of ${format.name}` },
            el(
              "table",
              {},
              el("caption", { class: "only-heard" }, `Groups of ${format.name}`),
              el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", class: "number" }, text)))),
              el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((text) => el("td", { class: "number" }, text))))),
            ),
          ),
        ];
      });
    section(
      "groups",
      "Groups that share a scale",
      el("p", {}, "What a group can hold, by its largest magnitude, amax: the scale times an element is a value."),
      ...tables,
    );
  }

  about() {
    section(
      "about",
      "About this page",
      el("dl", {}, ...this.data.formats.flatMap((format) => [el("dt", {}, format.name), el("dd", {}, format.source)])),
      el("p", {}, "Made by report.py --formats; it needs no network."),
      el("p", {}, "By keyboard: ", el("kbd", {}, "Tab"), " goes from control to control and from chart to chart. In a chart, ", KEYS),
    );
  }
}

(async () => {
  theme.start();
  const data = JSON.parse(await unpacked("packed-data"));
  byId("main").replaceChildren();
  new Formats(data);
  document.body.dataset.ready = "true";
  let width = innerWidth;
  addEventListener("resize", () => {
    // names are cut to the width
    if (innerWidth !== width) charts.all.forEach((chart) => chart.changed());
    width = innerWidth;
  });
  requestAnimationFrame(() => setTimeout(() => plotly.load(), 0)); // the text is painted first
})();
