// A chart of plotly's with what it lacks: a cursor for the keyboard, a read-out, the page's theme.

const plotly = {
  ready: null,
  /** plotly is unpacked when the page's text stands, because that takes about a second. */
  load() {
    this.ready ??= unpacked("packed-plotly").then((text) => {
      document.head.append(el("script", {}, text));
      return window.Plotly;
    });
    return this.ready;
  },
};

const DASHES = ["solid", "dash", "dot", "dashdot"];
const SERIES = 7;

/** How the curve of this number looks: the light colours, the last two, begin with a broken line. */
function look(index) {
  const dash = DASHES[(Math.floor(index / SERIES) + (index % SERIES >= SERIES - 2)) % DASHES.length];
  return { colour: colour(`series-${index % SERIES}`), dash, variable: `var(--series-${index % SERIES})` };
}

/** A piece of that curve, for legends and tables. */
function swatch(index) {
  const made = look(index);
  const dashes = { solid: null, dash: "9 4", dot: "2 4", dashdot: "9 3 2 3" }[made.dash];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const attributes = { x1: 0, x2: 34, y1: 6, y2: 6, "stroke-width": 3, ...(dashes && { "stroke-dasharray": dashes }) };
  for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
  line.style.stroke = made.variable; // follows the theme by itself
  svg.setAttribute("class", "swatch");
  svg.setAttribute("viewBox", "0 0 34 12");
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  return svg;
}

const KEYS = "Arrow keys move through the values, Home and End to the ends, Enter chooses, Escape leaves.";

const charts = {
  all: [],
  watcher: new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const chart = charts.all.find((one) => one.plot === entry.target);
        chart.visible = entry.isIntersecting;
        if (chart.visible) chart.draw();
      }
    },
    { rootMargin: "300px" },
  ),
};

/**
 * make() -> {traces, layout, height, pick}: what is drawn now, or null for nothing. Each trace that can be read has
 * `text`, of points or of a matrix; pick(trace, point) is called by a click or by Enter. A chart is drawn when it comes
 * into view, and again after `changed()` and with a new theme.
 */
class Chart {
  constructor(label, make) {
    Object.assign(this, { label, make, visible: false, stale: true, cursor: null, spec: null });
    this.plot = el("div", {
      class: "plot",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "chart",
      onkeydown: (event) => this.key(event),
    });
    this.readout = el("p", { class: "readout" });
    this.node = el("figure", {}, this.plot, this.readout);
    charts.all.push(this);
    charts.watcher.observe(this.plot);
  }

  changed() {
    this.stale = true;
    if (this.visible) this.draw();
  }

  async draw() {
    if (!this.stale) return;
    this.stale = false;
    const spec = this.make();
    this.node.hidden = spec === null;
    if (spec === null) return;
    this.plot.style.height = `${spec.height ?? 380}px`;
    this.plot.setAttribute("aria-label", `${spec.label ?? this.label}. ${KEYS}`);
    const library = await plotly.load();
    this.spec = spec;
    this.cursor = null;
    this.readout.textContent = "";
    const kind = spec.traces[0]?.type;
    if (this.listens && kind !== this.kind) {
      // A map's axes leave the titles of a curve's in the wrong place.
      library.purge(this.plot);
      this.listens = false;
    }
    this.kind = kind;
    await library.react(this.plot, spec.traces, this.layout(spec), {
      responsive: true,
      displaylogo: false,
      displayModeBar: true,
      modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
      toImageButtonOptions: { filename: this.label.replace(/\W+/g, "_"), scale: 2 },
    });
    if (!this.listens) this.listen();
    this.plot.dataset.drawn = String(Number(this.plot.dataset.drawn ?? 0) + 1);
  }

  layout(spec) {
    const text = { color: colour("text"), family: getComputedStyle(document.body).fontFamily, size: 13 };
    const axis = {
      gridcolor: colour("line"),
      zerolinecolor: colour("line"),
      linecolor: colour("faint"),
      automargin: true,
      tickcolor: colour("faint"),
      exponentformat: "power",
      title: { font: text, standoff: 14 },
    };
    const { xaxis = {}, yaxis = {}, ...others } = spec.layout;
    const merged = (ours) => ({ ...axis, ...ours, title: { ...axis.title, ...(ours.title ?? {}) } });
    return {
      font: text,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: false,
      // Said at each drawing, because plotly keeps the size of the first one.
      width: this.plot.clientWidth,
      height: this.plot.clientHeight,
      hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      margin: { l: 10, r: 10, t: 36, b: 48 },
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("faint"), font: text, align: "left", namelength: 0 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: colour("accent") },
      xaxis: merged(xaxis),
      yaxis: merged(yaxis),
      ...others,
    };
  }

  listen() {
    this.listens = true;
    const place = (event) => {
      const point = event.points.find((one) => this.spec.traces[one.curveNumber]?.text) ?? null;
      return point && { trace: point.curveNumber, point: point.pointNumber ?? point.pointIndex };
    };
    this.plot.on("plotly_hover", (event) => {
      const at = place(event);
      if (!at) return;
      this.cursor = at;
      this.readout.textContent = this.read(at);
    });
    this.plot.on("plotly_click", (event) => {
      const at = place(event);
      if (at) this.spec.pick?.(at.trace, at.point);
    });
  }

  read({ trace, point }) {
    const text = this.spec.traces[trace].text;
    const one = Array.isArray(point) ? text[point[0]][point[1]] : text[point];
    return unplain(
      String(one ?? "")
        .replace(/<br>/g, ", ")
        .replace(/<\/?b>/g, ""),
    );
  }

  /** The readable traces, and the first value of the first of them. */
  start() {
    const trace = this.readable()[0];
    const isMatrix = Array.isArray(this.spec.traces[trace].text[0]);
    return { trace, point: isMatrix ? [this.spec.traces[trace].text.length - 1, 0] : 0 };
  }

  readable() {
    return this.spec.traces.map((trace, i) => i).filter((i) => this.spec.traces[i].text?.length);
  }

  key(event) {
    if (event.target !== this.plot || !this.spec || !this.readable().length) return;
    const moves = {
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
      ArrowUp: [1, 0],
      ArrowDown: [-1, 0],
      Home: [0, -1e9],
      End: [0, 1e9],
    };
    if (event.key === "Escape") {
      this.cursor = null;
      window.Plotly.Fx.unhover(this.plot);
      this.readout.textContent = "";
      return;
    }
    if (event.key === "Enter" && this.cursor) {
      event.preventDefault();
      this.spec.pick?.(this.cursor.trace, this.cursor.point);
      return;
    }
    if (!moves[event.key]) return;
    event.preventDefault();
    this.cursor = this.cursor ? this.moved(...moves[event.key]) : this.start();
    window.Plotly.Fx.hover(this.plot, [{ curveNumber: this.cursor.trace, pointNumber: this.cursor.point }]);
    this.readout.textContent = this.read(this.cursor);
    said(this.readout.textContent);
  }

  /** Along: to the next value that is there. Across: to the next row of a matrix, or to the next curve. */
  moved(across, along) {
    const { trace, point } = this.cursor;
    const text = this.spec.traces[trace].text;
    const bounded = (value, length) => Math.min(Math.max(value, 0), length - 1);
    if (Array.isArray(point))
      return { trace, point: [bounded(point[0] + across, text.length), bounded(point[1] + along, text[0].length)] };
    if (across) {
      const traces = this.readable();
      const next = traces[(traces.indexOf(trace) + traces.length - across) % traces.length];
      return { trace: next, point: bounded(point, this.spec.traces[next].text.length) };
    }
    return { trace, point: bounded(point + along, text.length) };
  }
}

theme.listeners.push(() => charts.all.forEach((chart) => chart.changed()));
