
"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
let stored = JSON.parse(byId("names").textContent);
const DRAFT = `nefkern-names-${data.checkpoint}`;
const similarity = Uint8Array.from(atob(data.similarity), (c) => c.charCodeAt(0));
const order = ["size", "number", "name", "margin", "alike"];

let names = new Map(); // cluster -> name
let colours = new Map(); // name -> #rrggbb, in the order of the classes
let selected = 0, tile = 64, dirty = false, shown = [];
const cards = [];

// ---- small parts: text enters the page by textContent and value only ----

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, bad = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("bad", bad);
}

const picture = (id) => new Promise((done) => {
  const image = new Image();
  image.onload = () => done(image);
  image.src = "data:image/jpeg;base64," + byId(id).textContent;
});

const clean = (text) => [...text.replace(/\s+/g, " ").trim()].slice(0, 200).join("").trim();
const alike = (a, b) => similarity[a * data.clusters.length + b];

// ---- names ----

function load(content) {
  names = new Map(Object.entries(content.names).map(([k, name]) => [Number(k), name]));
  colours = new Map(content.classes.map((entry) => [entry.name, entry.colour]));
}

function content() {
  const used = new Set(names.values());
  const classes = [...colours].filter(([name]) => used.has(name) || data.kept.includes(name))
    .map(([name, colour]) => ({ name, colour }));
  return { clusters: data.clusters.length, checkpoint: data.checkpoint, classes,
           names: Object.fromEntries([...names].sort((a, b) => a[0] - b[0])) };
}

function yaml() {
  const all = content(), quoted = JSON.stringify; // JSON's texts are YAML's
  return [`clusters: ${all.clusters}`, `checkpoint: ${quoted(all.checkpoint)}`,
    all.classes.length ? "classes:" : "classes: []",
    ...all.classes.map((c) => `- {name: ${quoted(c.name)}, colour: ${quoted(c.colour)}}`),
    names.size ? "names:" : "names: {}",
    ...Object.entries(all.names).map(([k, name]) => `  ${k}: ${quoted(name)}`), ""].join("\n");
}

function rename(cluster, text) {
  const name = clean(text);
  if (name === (names.get(cluster) ?? "")) return;
  if (name) names.set(cluster, name); else names.delete(cluster);
  if (name && !colours.has(name)) {
    const taken = new Set(colours.values());
    colours.set(name, data.clusters.map((c) => c.colour).find((c) => !taken.has(c)) ?? "#888888");
  }
  changed();
}

function changed() {
  dirty = true;
  byId("discard").hidden = false;
  try { localStorage.setItem(DRAFT, JSON.stringify(content())); } catch { /* not kept, then */ }
  showNames();
}

function forget() {
  dirty = false;
  byId("discard").hidden = true;
  try { localStorage.removeItem(DRAFT); } catch { /* there was none */ }
}

async function save() {
  if (document.activeElement.blur) document.activeElement.blur(); // takes what is being typed
  if (!data.serve) {
    const file = new Blob([yaml()], { type: "application/yaml" });
    const link = element("a", { href: URL.createObjectURL(file), download: "names.yaml" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    dirty = false;
    say(`names.yaml: ${names.size} clusters named`);
    return;
  }
  const sent = JSON.stringify(content());
  try {
    const answer = await fetch("/names", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: sent });
    const text = await answer.text();
    if (!answer.ok) throw new Error(text);
    stored = JSON.parse(sent);
    if (sent === JSON.stringify(content())) forget();
    say(text);
  } catch (error) {
    say(`not saved: ${error.message}`, true);
  }
}

// ---- cards ----

function card(number) {
  const cluster = data.clusters[number];
  const input = element("input", { placeholder: "name", maxLength: 200, autocomplete: "off" });
  input.setAttribute("list", "known");
  input.setAttribute("aria-label", `name of cluster ${number}`);
  input.addEventListener("change", () => rename(number, input.value));
  input.addEventListener("focus", () => select(number, false));
  const swatch = element("span", { className: "swatch" });
  swatch.style.background = cluster.colour;
  const percent = (100 * cluster.share).toFixed(cluster.share < 0.001 ? 3 : 1);
  const facts = cluster.patches
    ? `${percent}% of the patches, in ${cluster.images} images, `
      + `decided ${cluster.margin.toFixed(2)}× as clearly as the average`
    : "wins no patch of these images";
  const body = element("div", { className: "body" });
  const made = element("section", { className: "card", id: `c${number}` },
    element("div", { className: "head" }, swatch, element("b", { textContent: `${number}` }), input,
      element("span", { className: "facts", textContent: facts })), body);
  made.classList.toggle("empty", !cluster.patches);
  made.addEventListener("click", () => select(number, false));
  return { made, input, body, filled: false };
}

async function fill(number) {
  const entry = cards[number], cluster = data.clusters[number];
  if (entry.filled || !cluster.patches) return;
  entry.filled = true;
  const sheet = element("canvas", { width: data.columns * data.tile, height: 3 * data.tile });
  sheet.addEventListener("click", (event) => {
    const x = Math.floor(event.offsetX / tile), y = Math.floor(event.offsetY / tile);
    const rival = y === 1 ? cluster.rivals[x]
      : y === 2 ? cluster.segmentRivals[x - data.segments] : undefined;
    if (rival !== undefined) {
      event.stopPropagation();
      select(rival);
    }
  });
  const near = element("div", { className: "like facts", textContent: "near it: " });
  const others = data.clusters.map((_, k) => k).filter((k) => k !== number && data.clusters[k].patches);
  others.sort((a, b) => alike(number, b) - alike(number, a));
  for (const other of others.slice(0, 8)) {
    const go = element("button", { textContent: label(other) });
    go.dataset.cluster = other;
    go.addEventListener("click", (event) => { event.stopPropagation(); select(other); });
    near.append(go);
  }
  const where = element("div", { className: "where" });
  entry.body.append(element("div", { className: "sheet" }, sheet), near, where);
  picture(`s${number}`).then((image) => sheet.getContext("2d").drawImage(image, 0, 0));
  for (const [index, share] of cluster.where) where.append(place(number, index, share));
}

function place(number, index, share) {
  const image = data.images[index], canvas = element("canvas");
  picture(`i${index}`).then((photo) => {
    canvas.width = photo.width;
    canvas.height = photo.height;
    const context = canvas.getContext("2d");
    context.drawImage(photo, 0, 0);
    const bytes = atob(image.map), [rows, cols] = image.cells;
    context.fillStyle = "rgba(0, 0, 0, .72)"; // all but the cluster
    const w = photo.width / cols, h = photo.height / rows;
    for (let i = 0; i < rows * cols; i++) {
      const found = bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1);
      if (found !== number) {
        const x = Math.floor((i % cols) * w), y = Math.floor(Math.floor(i / cols) * h);
        context.fillRect(x, y, Math.floor((i % cols + 1) * w) - x,
          Math.floor((Math.floor(i / cols) + 1) * h) - y);
      }
    }
  });
  const caption = `${image.name} (${Math.round(100 * share)}%)`;
  return element("figure", { title: caption }, canvas,
    element("figcaption", { textContent: caption }));
}

const label = (k) => (names.has(k) ? `${k} ${names.get(k)}` : `${k}`);

function showNames() {
  const used = new Map();
  for (const [k, name] of names) used.set(name, [...(used.get(name) ?? []), k]);
  cards.forEach(({ input, made }, k) => {
    if (document.activeElement !== input) input.value = names.get(k) ?? "";
    made.querySelector(".swatch").style.background =
      colours.get(names.get(k)) ?? data.clusters[k].colour;
  });
  for (const go of document.querySelectorAll(".like button"))
    go.textContent = label(Number(go.dataset.cluster));
  const known = [...colours.keys()].filter((name) => used.has(name) || data.kept.includes(name));
  byId("known").replaceChildren(...known.map((value) => element("option", { value })));
  byId("classes").replaceChildren(...known.map((name) => {
    const members = used.get(name) ?? [];
    const share = members.reduce((sum, k) => sum + data.clusters[k].share, 0);
    const colour = element("input", { type: "color", value: colours.get(name) });
    colour.setAttribute("aria-label", `colour of ${name}`);
    colour.addEventListener("change", () => { colours.set(name, colour.value); changed(); });
    const go = element("button", { textContent: name });
    go.addEventListener("click", () => { byId("search").value = `=${name}`; arrange(); });
    return element("div", {}, colour, go, element("span", {
      textContent: `${members.length} cluster${members.length === 1 ? "" : "s"}, ${(100 * share).toFixed(1)}%` }));
  }));
  if (!known.length) byId("classes").textContent = "none yet: type a name beside a cluster";
}

// ---- order, search, selection ----

function matches(k, wanted) {
  if (!wanted) return true;
  const name = (names.get(k) ?? "").toLowerCase();
  if (wanted.startsWith("=")) return name === wanted.slice(1);
  if (/^\d+$/.test(wanted)) return String(k) === wanted;
  return name.includes(wanted)
    || data.clusters[k].where.some(([i]) => data.images[i].name.toLowerCase().includes(wanted));
}

function arrange() {
  const c = data.clusters, sort = byId("sort").value;
  const keys = {
    size: (a, b) => c[b].patches - c[a].patches,
    number: () => 0,
    name: (a, b) => (names.has(b) - names.has(a))
      || (names.get(a) ?? "").localeCompare(names.get(b) ?? ""),
    margin: (a, b) => (!c[a].patches - !c[b].patches) || c[a].margin - c[b].margin,
    alike: (a, b) => (b === selected) - (a === selected) || alike(selected, b) - alike(selected, a),
  };
  const wanted = byId("search").value.trim().toLowerCase();
  shown = c.map((_, k) => k).filter((k) => matches(k, wanted));
  shown.sort((a, b) => keys[sort](a, b) || a - b);
  byId("cards").replaceChildren(...shown.map((k) => cards[k].made));
  say(shown.length === c.length ? "" : `${shown.length} of ${c.length} clusters`);
}

function select(number, scroll = true) {
  cards[selected].made.classList.remove("selected");
  selected = number;
  cards[number].made.classList.add("selected");
  if (!scroll) return;
  if (!shown.includes(number)) { byId("search").value = ""; arrange(); }
  fill(number);
  cards[number].made.scrollIntoView({ block: "nearest" });
}

function step(by) {
  const at = shown.indexOf(selected) + by;
  if (at >= 0 && at < shown.length) select(shown[at]);
  return shown[at];
}

function zoom(factor) {
  tile = Math.round(Math.min(192, Math.max(32, tile * factor)));
  document.documentElement.style.setProperty("--tile", `${tile}px`);
}

function nameIt() {
  const { input } = cards[selected];
  input.focus();
  input.select();
}

const keys = {
  j: () => step(1), k: () => step(-1), n: nameIt, Enter: nameIt, "+": () => zoom(1.25),
  "=": () => zoom(1.25), "-": () => zoom(0.8), "/": () => byId("search").focus(),
  s: () => {
    byId("sort").value = order[(order.indexOf(byId("sort").value) + 1) % order.length];
    arrange();
    window.scrollTo(0, 0);
  },
};

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "s") {
    event.preventDefault();
    save();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target.closest("input, select, button");
  if (!typing && keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  } else if (typing && event.key === "Escape") {
    typing.blur();
  } else if (event.key === "Enter" && event.target.closest(".card input")) {
    event.preventDefault();
    event.target.blur(); // keeps the name
    if (step(1) !== undefined) nameIt();
  } else if (event.key === "Enter" && event.target === byId("search") && shown.length) {
    event.target.blur();
    select(shown[0]);
  }
});

// ---- begin ----

data.clusters.forEach((_, k) => cards.push(card(k)));
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries)
    if (entry.isIntersecting) fill(Number(entry.target.id.slice(1)));
}, { rootMargin: "600px" });
cards.forEach(({ made }) => watcher.observe(made));
load(stored);
try {
  const draft = JSON.parse(localStorage.getItem(DRAFT));
  if (draft) { load(draft); byId("discard").hidden = false; }
} catch { /* none, or not readable */ }
byId("sort").addEventListener("change", arrange);
byId("search").addEventListener("input", arrange);
byId("smaller").addEventListener("click", () => zoom(0.8));
byId("larger").addEventListener("click", () => zoom(1.25));
byId("save").addEventListener("click", save);
byId("discard").addEventListener("click", () => { forget(); load(stored); showNames(); arrange(); });
addEventListener("beforeunload", (event) => { if (dirty) event.preventDefault(); });
arrange();
showNames();
select(shown[0]);
if (!byId("discard").hidden) say("names that were not saved yet are back");
