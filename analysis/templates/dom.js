"use strict";
// What every part of the page needs: elements, numbers for people, the theme, and unpacking.

/** An element with attributes (those that begin with "on" are listeners) and children (nodes, texts; null is none). */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const byId = (id) => document.getElementById(id);

/** A label around a select. options: [value, text]; changed(value) is called with a text. */
function select(label, id, options, value, changed) {
  const made = el("select", { id, onchange: () => changed(made.value) });
  made.fill = (rows, chosen) => {
    made.replaceChildren(
      ...rows.map(([v, text]) => el("option", { value: v, selected: String(v) === String(chosen) }, text)),
    );
  };
  made.fill(options, value);
  const around = el("label", {}, label, made);
  around.select = made;
  return around;
}

/** A label around a checkbox. */
function checkbox(label, id, checked, changed) {
  const made = el("input", { type: "checkbox", id, checked, onchange: () => changed(made.checked) });
  return el("label", {}, made, label);
}

/** A number for people: `digits` significant ones; "–" for none. */
function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return String(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}

const percent = (value, digits = 3) =>
  value === null || value === undefined ? "–" : `${number(100 * value, digits)} %`;

/** plotly reads a few tags in its texts; names of layers and files are to be read as they are. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const unplain = (text) => text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");

/** The end of a long name says more than its beginning. */
const shortened = (text, most) => (text.length > most ? `…${text.slice(text.length - most + 1)}` : text);

const said = (text) => {
  byId("said").textContent = text;
};

/** A section with a heading, in the list of sections too. */
function section(id, title, ...children) {
  const made = el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    ...children,
  );
  byId("main").append(made);
  byId("contents").append(el("a", { href: `#${id}` }, title));
  return made;
}

// The theme: that of the system, or the one that was chosen here, which the browser remembers where it may.

const theme = { listeners: [], system: matchMedia("(prefers-color-scheme: dark)") };

theme.isDark = () => (byId("theme").value ? byId("theme").value === "dark" : theme.system.matches);

theme.apply = () => {
  document.documentElement.classList.toggle("dark", theme.isDark());
  for (const listener of theme.listeners) listener();
};

theme.start = () => {
  try {
    byId("theme").value = localStorage.getItem("low_precision_ml.theme") ?? "";
  } catch {
    /* a page that may not store */
  }
  byId("theme").addEventListener("change", () => {
    try {
      localStorage.setItem("low_precision_ml.theme", byId("theme").value);
    } catch {
      /* the same */
    }
    theme.apply();
  });
  theme.system.addEventListener("change", theme.apply);
  theme.apply();
};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** The same colour, mostly transparent. */
function faded(hex, share) {
  const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  return `rgba(${parts.join(",")},${share})`;
}

/** The text that was packed by gzip and base64 into a script element. */
async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
