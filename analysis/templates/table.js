// A table that is sorted, filtered and turned over by page, with buttons.

/**
 * columns: {title, value(row) -> number or text to sort by, cell(row) -> node or text, kind: "number", "text" or "name"}.
 * rows: anything. Shows `most` rows at a time. `keep`: whether a row is looked at by the filter, as a text.
 */
class Table {
  constructor(id, caption, columns, rows, { most = 50, textOf = null } = {}) {
    Object.assign(this, { id, columns, rows, most, textOf, page: 0, order: null, descending: false, words: "" });
    this.marked = null;
    this.heads = columns.map((column, i) =>
      el(
        "th",
        { scope: "col", class: column.kind },
        column.value ? el("button", { type: "button", onclick: () => this.sort(i) }, column.title) : column.title,
      ),
    );
    this.body = el("tbody");
    this.count = el("span", { class: "faint", role: "status" });
    this.back = el("button", { type: "button", onclick: () => this.turn(-1) }, "Previous");
    this.forth = el("button", { type: "button", onclick: () => this.turn(1) }, "Next");
    this.search =
      textOf &&
      el("input", {
        type: "search",
        id: `${id}-filter`,
        size: 18,
        oninput: () => {
          this.words = this.search.value;
          this.page = 0;
          this.draw();
        },
      });
    this.controls = el(
      "div",
      { class: "controls" },
      this.search && el("label", {}, "Filter", this.search),
      this.count,
      this.back,
      this.forth,
    );
    const table = el(
      "table",
      { id },
      el("caption", { class: "only-heard" }, caption),
      el("thead", {}, el("tr", {}, ...this.heads)),
      this.body,
    );
    this.node = el(
      "div",
      {},
      this.controls,
      el("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": caption }, table),
    );
    this.draw();
  }

  /** The rows that the filter leaves, in their order: those with every word, and with every number as a whole one. */
  listed() {
    const words = this.words.toLowerCase().split(/\s+/).filter(Boolean);
    const tests = words.map((word) =>
      /^\d+$/.test(word)
        ? (text) => new RegExp(`(?<![\\w.])${word}(?![\\w.])`).test(text)
        : (text) => text.includes(word),
    );
    let rows = this.rows;
    if (tests.length) {
      rows = rows.filter((row) => {
        const text = this.textOf(row).toLowerCase();
        return tests.every((test) => test(text));
      });
    }
    if (this.order === null) return rows;
    const key = this.columns[this.order].value;
    const sign = this.descending ? -1 : 1;
    const nothing = (value) => value === null || value === undefined || value === "";
    return [...rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (nothing(x) || nothing(y)) return nothing(x) - nothing(y); // what has no value is last, either way
      if (typeof x === "number" && typeof y === "number") return sign * (x - y);
      return sign * String(x).localeCompare(String(y), "en", { numeric: true });
    });
  }

  sort(column) {
    this.descending = this.order === column ? !this.descending : false;
    this.order = column;
    this.page = 0;
    this.heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", this.descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    this.draw();
  }

  turn(pages) {
    this.page += pages;
    this.draw();
  }

  /** Turn to the page with that row, and mark it. */
  mark(row) {
    this.marked = row;
    let place = this.listed().indexOf(row);
    if (place < 0 && this.search) {
      this.search.value = this.words = "";
      place = this.listed().indexOf(row);
    }
    this.page = Math.max(0, Math.floor(place / this.most));
    this.draw();
    this.body.querySelector(".marked")?.scrollIntoView({ block: "nearest" });
  }

  draw() {
    const rows = this.listed();
    const last = Math.max(0, Math.ceil(rows.length / this.most) - 1);
    this.page = Math.min(Math.max(this.page, 0), last);
    const from = this.page * this.most;
    const shown = rows.slice(from, from + this.most);
    this.body.replaceChildren(
      ...shown.map((row) =>
        el(
          "tr",
          { class: row === this.marked ? "marked" : null },
          ...this.columns.map((column) => el("td", { class: column.kind }, column.cell(row))),
        ),
      ),
    );
    this.count.textContent =
      rows.length > this.most
        ? `${from + 1} to ${from + shown.length} of ${rows.length}`
        : `${rows.length}${rows.length < this.rows.length ? ` of ${this.rows.length}` : ""}`;
    this.back.hidden = this.forth.hidden = last === 0;
    this.back.disabled = this.page === 0;
    this.forth.disabled = this.page === last;
  }
}
