// Watched runs: heat maps of layers and steps, curves, and the exponents of one layer beside its format's range.

const ALL = "all sites";
const MODEL = "(the model)"; // the name of its root

/** The name of a row: layer and site, and what was tried there. */
const rowName = ([layer, site, , also]) => `${layer || MODEL}${site ? ` ${site}` : ""}${also ? ` as ${also}` : ""}`;

function shownStatistic(kind) {
  if (kind === "share") return (value) => percent(value);
  if (kind === "decibel") return (value) => (value === null ? "–" : `${number(value, 3)} dB`);
  return (value) => number(value, 4);
}

/** Whether its colours and axes are logarithmic at first. */
const isSize = (kind) => kind === "size";

class Watched {
  /** watched: {runs, there}. histograms: whether a row has exponents. */
  constructor(data, watched, id, title, words, histograms) {
    Object.assign(this, { data, watched, id, histograms });
    this.owner = [];
    data.settings.forEach((setting, index) =>
      setting.runs.forEach((run) => {
        this.owner[run] = index;
      }),
    );
    const names = [...new Set(watched.runs.flatMap((run) => Object.keys(run.values)))];
    this.names = names;
    // What can be looked at: each run as it was, and as what was tried beside it.
    this.views = watched.runs.flatMap((run) =>
      [...new Set(run.rows.map((row) => row[3] ?? ""))].map((also) => ({ run, also, name: this.told(run, also) })),
    );
    // First one that rounded, or else what was tried beside one that did not.
    const rounds = this.views.findIndex(({ run, also }) => !also && data.settings[this.owner[run.run]].rounds);
    const first = rounds < 0 ? this.views.findIndex(({ also }) => also) : rounds;
    this.state = {
      view: Math.max(0, first),
      beside: -1,
      statistic: this.telling(this.views[Math.max(0, first)].run),
      site: "",
      log: false,
      curves: id === "shadow",
      row: null,
      column: null,
    };
    const views = this.views.map(({ name }, i) => [i, name]);
    const pick = (key, own) => (value) => {
      this.state[key] = own ? Number(value) : value;
      this.chosen(key);
    };
    this.selects = {
      view: select("Run", `${id}-run`, views, this.state.view, pick("view", true)),
      beside: select("Beside it", `${id}-beside`, [[-1, "none"], ...views], -1, pick("beside", true)),
      statistic: select("Statistic", `${id}-statistic`, [], "", pick("statistic")),
      site: select("Site", `${id}-site`, [], "", pick("site")),
    };
    this.log = checkbox("logarithmic", `${id}-log`, false, (on) => {
      this.state.log = on;
      this.redraw();
    });
    this.curves = checkbox("curves", `${id}-curves`, this.state.curves, (on) => {
      this.state.curves = on;
      this.redraw();
    });
    this.selects.view.hidden = this.selects.beside.hidden = this.views.length < 2;
    this.meaning = el("p", { class: "faint" });
    this.charts = [0, 1].map((k) => new Chart(`${title} ${k + 1}`, () => this.matrix(k)));
    this.heads = [0, 1].map(() => el("h3"));
    this.legends = [0, 1].map(() => el("ul", { class: "legend", "aria-label": "Layers" }));
    const parts = [
      el("div", { class: "controls" }, ...Object.values(this.selects), this.log, this.curves),
      this.meaning,
      el(
        "div",
        { class: "pair" },
        ...[0, 1].map((k) => el("div", {}, this.heads[k], this.charts[k].node, this.legends[k])),
      ),
    ];
    if (histograms) {
      this.detail = el("h3", { id: `${id}-detail` });
      this.exponents = new Chart("Exponents", () => {
        const spec = exponentsChart(this.run(0), this.state.row, this.state.column);
        this.rangeWords.textContent = spec?.words ?? "";
        return spec;
      });
      this.time = new Chart("Over the steps", () => this.overTime());
      this.rangeWords = el("p", { class: "faint" });
      this.key = el(
        "ul",
        { class: "legend" },
        el(
          "li",
          {},
          el("span", { class: "box", style: "background: var(--normal)" }),
          el("span", {}, "normal numbers of the format"),
        ),
        el(
          "li",
          {},
          el("span", { class: "box", style: "background: var(--subnormal)" }),
          el("span", {}, "subnormal ones, with fewer digits"),
        ),
      );
      parts.push(
        this.detail,
        el(
          "div",
          { class: "pair" },
          el("div", {}, this.exponents.node, this.key, this.rangeWords),
          el("div", {}, this.time.node),
        ),
      );
    }
    const fewer = watched.runs.find((run) => run.steps.length < run.of);
    const about = [];
    if (watched.runs.length < watched.there)
      about.push(
        `The page has ${watched.runs.length} of ${watched.there} such runs, those of different settings first: report.py with fewer record folders shows others.`,
      );
    if (fewer) about.push(`Of ${fewer.of} watched steps, ${fewer.steps.length} are here.`);
    section(
      id,
      title,
      el("p", { class: "faint" }, words),
      ...parts,
      about.length ? el("p", { class: "faint" }, about.join(" ")) : "",
    );
    this.chosen("statistic");
  }

  told(run, also) {
    const name = `${this.data.settings[this.owner[run.run]].name}, seed ${this.data.runs.seeds[run.run]}`;
    return also ? `${name}, as ${also} would round it` : name;
  }

  /** What is looked at first: the worst of what is lost, if a tenth of something is. */
  telling(run) {
    const most = (name) => (run.values[name] ?? []).flat().reduce((a, b) => Math.max(a, b ?? 0), 0);
    return ["lost_updates", "not_finite", "flushed", "saturated"].find((name) => most(name) >= 0.1) ?? this.names[0];
  }

  /** The left one, or the one beside it; null where there is none. */
  view(k) {
    const place = k ? this.state.beside : this.state.view;
    return place < 0 ? null : this.views[place];
  }

  run(k) {
    return this.view(k)?.run ?? null;
  }

  /** The rows of a view that have the statistic, at the chosen site. */
  rows(k, anySite = false, statistic = this.state.statistic) {
    const { run, also: tried } = this.view(k);
    const values = run.values[statistic] ?? [];
    return run.rows
      .map((_, i) => i)
      .filter((i) => {
        const [, site, , also] = run.rows[i];
        return values[i] && (also ?? "") === tried && (anySite || this.state.site === ALL || site === this.state.site);
      });
  }

  /** After a choice: offer what there is, keep what can be kept. */
  chosen(key) {
    const run = this.run(0);
    if (key === "view" || key === "statistic") {
      const offered = this.names.filter((name) => this.rows(0, true, name).length);
      if (!offered.includes(this.state.statistic)) [this.state.statistic] = offered;
      this.selects.statistic.select.fill(
        offered.map((name) => [name, this.data.statistics[name].label]),
        this.state.statistic,
      );
      const rows = this.rows(0, true).map((i) => run.rows[i]);
      const sites = [...new Set(rows.map((row) => row[1]))];
      if (this.state.site !== ALL && !sites.includes(this.state.site)) [this.state.site] = sites;
      this.selects.site.select.fill(
        [...sites, ...(sites.length > 1 ? [ALL] : [])].map((site) => [site, site]),
        this.state.site,
      );
      this.selects.site.hidden = sites.length < 2;
    }
    if (key === "statistic") {
      this.state.log = isSize(this.statistic().kind);
      this.log.querySelector("input").checked = this.state.log;
    }
    const row = this.state.row !== null && run.rows[this.state.row];
    const rows = this.rows(0);
    if (!row || !rows.includes(this.state.row)) this.state.row = rows[0] ?? null;
    if (this.state.column === null || this.state.column >= run.steps.length) this.state.column = run.steps.length - 1;
    this.redraw();
  }

  statistic() {
    return this.data.statistics[this.state.statistic];
  }

  redraw() {
    const { worse, text } = this.statistic();
    const bad = worse && `${worse} is bad${this.state.curves ? "" : ", and bright"}`;
    const words = [text, bad].filter(Boolean).join("; ");
    this.meaning.textContent = `${words.charAt(0).toUpperCase()}${words.slice(1)}.`;
    this.meaning.hidden = !text && !worse;
    // Both are there before either is drawn, because they share the width.
    for (const k of [0, 1]) this.heads[k].parentNode.hidden = !this.run(k);
    [0, 1].forEach((k) => {
      const run = this.run(k);
      this.heads[k].textContent = run && this.views.length > 1 ? this.view(k).name : "";
      this.charts[k].changed();
      this.legends[k].replaceChildren(...(run && this.state.curves ? this.legend(run, this.rows(k)) : []));
    });
    this.redrawDetail();
  }

  /** The curves' names; of many the first and the last, between which colours go. */
  legend(run, rows) {
    const ends = rows.length > SERIES ? [0, rows.length - 1] : rows.map((_, i) => i);
    const mark = (place) =>
      rows.length > SERIES
        ? el("span", { class: "box", style: `background: ${depthColour(place / (rows.length - 1))}` })
        : swatch(place);
    return ends.map((place) => el("li", {}, mark(place), el("span", {}, rowName(run.rows[rows[place]]))));
  }

  redrawDetail() {
    if (!this.histograms) return;
    const run = this.run(0);
    const row = this.state.row === null ? null : run.rows[this.state.row];
    const rule = row?.[2] && row[2] !== row[3] ? `: ${row[2]}` : "";
    this.detail.textContent = row ? rowName(row) + rule : "";
    this.exponents.changed();
    this.time.changed();
    this.key.hidden = this.rangeWords.hidden = row === null || !run.exponents.counts[this.state.row];
  }

  pick(row, column, k) {
    if (k) return; // the detail is of the first run
    this.state.row = row;
    this.state.column = column;
    this.redrawDetail();
    said(`${this.detail?.textContent ?? ""}, step ${this.run(0).steps[column]}: exponents and curve are shown below`);
  }

  /** The lowest and the highest value of both runs: they have one scale of colours. */
  ends() {
    const all = [0, 1]
      .filter((k) => this.view(k))
      .flatMap((k) => this.rows(k).flatMap((i) => this.run(k).values[this.state.statistic][i]));
    const values = all.filter((value) => value !== null && (!this.state.log || value > 0));
    return values.length ? [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))] : [0, 1];
  }

  text(run, row, column) {
    const value = run.values[this.state.statistic][row][column];
    const [, , rule] = run.rows[row];
    return `<b>${plain(rowName(run.rows[row]))}</b><br>step ${run.steps[column]}: ${shownStatistic(this.statistic().kind)(value)}${rule ? `<br>${plain(rule)}` : ""}`;
  }

  matrix(k) {
    const run = this.run(k);
    if (!run) return null;
    const rows = this.rows(k);
    if (!rows.length) return null;
    const { kind, label } = this.statistic();
    return this.state.curves ? this.lines(run, rows, label, k) : this.heatMap(run, rows, kind, label, k);
  }

  heatMap(run, rows, kind, label, k) {
    const [low, high] = this.ends();
    const upwards = [...rows].reverse(); // plotly begins below
    const scaled = (value) => (this.state.log && value !== null ? (value > 0 ? Math.log10(value) : null) : value);
    const width = this.charts[k].plot.clientWidth || byId("main").clientWidth;
    const letters = Math.floor(Math.min(width * 0.36, 330) / 7.4);
    const one = this.state.site !== ALL;
    const label1 = (row) => plain(shortened(one ? run.rows[row][0] || MODEL : rowName(run.rows[row]), letters));
    const symmetric = kind === "signed" && !this.state.log;
    const size = Math.max(Math.abs(low), Math.abs(high)) || 1;
    const fromZero = kind === "share" && !this.state.log;
    const [zmin, zmax] = symmetric ? [-size, size] : fromZero ? [0, high || 0.01] : [scaled(low), scaled(high)];
    const ticks = this.state.log
      ? { tickprefix: "10<sup>", ticksuffix: "</sup>" }
      : kind === "share"
        ? { tickformat: ".3~p" }
        : {};
    const traces = [
      {
        type: "heatmap",
        x: run.steps.map((_, i) => i),
        y: upwards.map((_, i) => i),
        z: upwards.map((i) => run.values[this.state.statistic][i].map(scaled)),
        zmin,
        zmax: zmax === zmin ? zmin + 1 : zmax,
        colorscale: symmetric ? "RdBu" : "Cividis",
        reversescale: this.statistic().worse === "low" && !symmetric,
        xgap: run.steps.length < 60 ? 1 : 0,
        ygap: 1,
        hoverongaps: false,
        hovertemplate: "%{text}<extra></extra>",
        text: upwards.map((i) => run.steps.map((_, column) => this.text(run, i, column))),
        colorbar: {
          orientation: "h",
          y: 1,
          yanchor: "bottom",
          thickness: 12,
          tickangle: 0,
          nticks: width < 600 ? 4 : 7,
          len: 0.6,
          x: 0,
          xanchor: "left",
          outlinewidth: 0,
          ...ticks,
        },
      },
    ];
    const every = Math.max(1, Math.ceil(run.steps.length / Math.max(2, Math.floor(width / 110))));
    const places = run.steps.map((_, i) => i).filter((i) => i % every === 0);
    const height = Math.min(1600, 18 * rows.length + 125);
    const everyRow = Math.ceil((14 * rows.length) / (height - 125)); // names need so much
    const named = upwards.map((_, y) => y).filter((y) => (rows.length - 1 - y) % everyRow === 0);
    return {
      traces,
      height,
      label: `${label} by layer and step`,
      layout: {
        margin: { l: 10, r: 10, t: 76, b: 30 },
        xaxis: {
          tickvals: places,
          ticktext: places.map((i, k) => (k ? String(run.steps[i]) : `step ${run.steps[i]}`)),
          showgrid: false,
        },
        yaxis: { tickvals: named, ticktext: named.map((y) => label1(upwards[y])), showgrid: false, zeroline: false },
      },
      pick: (_, [y, x]) => this.pick(upwards[y], x, k),
    };
  }

  /** A curve for each layer, the first ones dark. */
  lines(run, rows, label, k) {
    const { kind } = this.statistic();
    const traces = rows.map((row, place) =>
      this.line(
        run,
        row,
        rows.length > SERIES ? { colour: depthColour(place / (rows.length - 1)) } : look(place),
        kind,
      ),
    );
    return {
      traces,
      height: 380,
      label: `${label} by step, a curve for each layer`,
      layout: this.axes(label, kind),
      pick: (trace, point) => this.pick(rows[trace], traces[trace].columns[point], k),
    };
  }

  line(run, row, { colour: hue, dash = "solid" }, kind) {
    const values = run.values[this.state.statistic][row];
    const columns = run.steps.map((_, i) => i).filter((i) => values[i] !== null && (!this.state.log || values[i] > 0));
    return {
      x: columns.map((i) => run.steps[i]),
      y: columns.map((i) => values[i] * (kind === "share" ? 100 : 1)),
      columns,
      mode: columns.length > 1 ? "lines" : "markers",
      line: { color: hue, dash, width: 2 },
      hovertemplate: "%{text}<extra></extra>",
      text: columns.map((i) => this.text(run, row, i)),
    };
  }

  axes(label, kind) {
    return {
      xaxis: { title: { text: "step" } },
      yaxis: {
        title: { text: plain(label) + (kind === "share" ? " (%)" : "") },
        type: this.state.log ? "log" : "linear",
      },
    };
  }

  overTime() {
    const run = this.run(0);
    const { row } = this.state;
    const { kind, label } = this.statistic();
    if (row === null || !run.values[this.state.statistic]?.[row]) return null;
    const step = run.steps[this.state.column];
    return {
      traces: [this.line(run, row, look(1), kind)],
      height: 340,
      label: `${label} over the steps`,
      layout: {
        ...this.axes(label, kind),
        shapes: [
          {
            type: "line",
            x0: step,
            x1: step,
            yref: "paper",
            y0: 0,
            y1: 1,
            line: { color: colour("faint"), width: 1, dash: "dot" },
          },
        ],
      },
      pick: (_, point) => {
        this.state.column = point;
        this.redrawDetail();
      },
    };
  }
}

/** From dark to light along cividis, without its lightest part. */
function depthColour(share) {
  const [from, to] = theme.isDark()
    ? [
        [90, 130, 200],
        [255, 220, 90],
      ]
    : [
        [0, 32, 110],
        [190, 150, 40],
      ];
  return `rgb(${from.map((value, i) => Math.round(value + share * (to[i] - value))).join(",")})`;
}
