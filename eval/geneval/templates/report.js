"use strict";
const {models, prompts} = JSON.parse(document.getElementById("data").textContent);
const FEW = 4, MANY = 24;  // prompts of a task before "show more", with all tasks in view and with one
const SVG = "http:" + "//www.w3.org/2000/svg";  // a name, not an address
const $ = id => document.getElementById(id);
const tasks = [...new Set(prompts.map(p => p.task))];
const all = prompts.flatMap(p => p.models.flatMap(pictures => pictures ?? []));
const shown = {};  // task -> how many of its prompts are shown
const filter = {task: "all", verdict: "all", model: "all", words: "", differ: false};
const readable = task => task.replaceAll("_", " ");
const bad = one => one.unreadable || one.problem !== "";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function drawing(name, attributes = {}, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

// "red bench 0.97": what is known of an object.
const label = ([name, color, score]) => [color, name, score === null ? null : score.toFixed(2)].filter(part => part !== null).join(" ");
const verdict = one => one.ok ? "✓ right" : "✗ wrong";

// What counted, over a picture: below the dashed boxes of classes that the prompt does not name, which only in large have
// labels, then those that it names, and all labels above.
function boxes(prompt, one, large) {
  const {width: w, height: h} = one;
  const view = drawing("svg", {viewBox: `0 0 ${w} ${h}`, "aria-hidden": "true", class: "boxes", preserveAspectRatio: "none"});
  const labels = [], taken = [], asked = object => prompt.asked.indexOf(object[0]);
  for (const object of [...one.found].sort((a, b) => (asked(a) >= 0) - (asked(b) >= 0))) {
    const [, , , x0, y0, x1, y1] = object, place = {x: x0, y: y0, width: Math.max(0, x1 - x0), height: Math.max(0, y1 - y0)};
    const kind = asked(object) < 0 ? "other" : `c${asked(object) % 2}`;
    view.append(drawing("rect", {...place, class: "under"}), drawing("rect", {...place, class: kind}));
    if (kind === "other" && !large) continue;
    // A letter is about two thirds as wide as it is high; a long label is smaller, so that all of it is in the picture.
    const text = label(object), size = Math.min(Math.min(w, h) / (large ? 28 : 13), w * .97 / (text.length * .66));
    // Above, below or inside the box: the first place that is in the picture and free of other labels.
    const wide = text.length * size * .66, x = Math.max(1, Math.min(x0, w - wide - 1));
    const free = y => y > size && y < h - 1 && !taken.some(t => Math.abs(t.y - y) < size && x < t.x + t.wide && t.x < x + wide);
    const y = [y0 - size * .35, y1 + size * 1.05, y0 + size * 1.1, y1 - size * .4].find(free) ?? y0 + size * 2.2;
    taken.push({x, y, wide});
    labels.push(drawing("text", {x, y, "font-size": size, class: kind}, text));
  }
  view.append(...labels);
  return view;
}

// The copies of a prompt's pictures are read from the page only when they are shown.
const copies = (prompt, model) => JSON.parse($(`copies-${prompts.indexOf(prompt)}-${model}`).textContent);

function view(prompt, one, copy, large) {
  if (copy === null) return [element("span", {class: "gap"}, `picture ${one.problem}`)];
  const attributes = {src: copy, alt: "", width: one.width, height: one.height, decoding: "async", loading: "lazy"};
  if (Math.max(one.width, one.height) <= 96) attributes.class = "pixels";
  return [element("img", attributes), boxes(prompt, one, large)];
}

function enlarge(prompt, model, number, one, copy) {
  $("large-title").textContent = prompt.prompt;
  const facts = [`${models[model]}, picture ${number + 1}: ${verdict(one)}`, ...one.why, one.file];
  const found = one.found.map(object => {
    const [name, color, score, ...box] = object;
    return element("tr", {}, element("th", {scope: "row"}, name), element("td", {}, color ?? "—"),
      element("td", {}, score === null ? "—" : score.toFixed(3)), element("td", {}, box.map(edge => edge.toFixed(0)).join(", ")));
  });
  const table = element("table", {}, element("caption", {}, found.length ? "What counted" : "Nothing counted"));
  if (found.length) {
    const names = ["class", "colour", "score", "box, in pixels"].map(name => element("th", {scope: "col"}, name));
    table.append(element("thead", {}, element("tr", {}, ...names)), element("tbody", {}, ...found));
  }
  $("large-body").replaceChildren(
    element("figure", {class: one.ok ? "right" : "wrong"}, element("div", {class: "view"}, ...view(prompt, one, copy, true)),
      element("figcaption", {}, ...facts.flatMap(fact => [fact, element("br")]))),
    element("div", {class: "scroll"}, table));
  $("large").showModal();
}

function picture(prompt, model, number, one, copy) {
  const what = `picture ${number + 1}${models.length > 1 ? ` of ${models[model]}` : ""}, ${one.ok ? "right" : "wrong"}`;
  const button = element("button", {class: "view", type: "button", "aria-label": `enlarge ${what}`, title: one.file},
    ...view(prompt, one, copy, false));
  button.onclick = () => enlarge(prompt, model, number, one, copy);
  const caption = element("figcaption", {}, element("b", {}, verdict(one)));
  for (const why of one.why) caption.append(element("br"), why);
  return element("figure", {class: one.ok ? "right" : "wrong"}, button, caption);
}

const share = pictures => pictures.filter(one => one.ok).length / pictures.length;
const differs = prompt => prompt.models.every(Boolean) && prompt.models.some(m => share(m) !== share(prompt.models[0]));

// Of each model the numbers of its pictures that fit the filters.
function matches(prompt) {
  if (filter.task !== "all" && filter.task !== prompt.task || filter.differ && !differs(prompt)) return models.map(() => []);
  const words = filter.words.split(/\s+/);
  return prompt.models.map((pictures, model) => (pictures ?? []).map((one, number) => number).filter(number => {
    const one = pictures[number], text = `${prompt.prompt}\n${one.why.join("\n")}\n${one.file}`.toLowerCase();
    return (filter.model === "all" || filter.model === String(model)) && words.every(word => text.includes(word))
      && (filter.verdict === "all" || (filter.verdict === "unreadable" ? bad(one) : one.ok === (filter.verdict === "right")));
  }));
}

function column(prompt, model, numbers) {
  const pictures = prompt.models[model];
  const made = element("section", {});
  if (models.length > 1) {
    const count = pictures ? `, ${pictures.filter(one => one.ok).length}/${pictures.length} right` : "";
    made.append(element("p", {class: "who"}, element("span", {class: `swatch model${model % 6}`}), models[model] + count));
  }
  if (!pictures) made.append(element("p", {class: "none"}, "has no such prompt"));
  else if (!numbers.length) made.append(element("p", {class: "none"}, "no picture fits these filters"));
  else {
    const uris = copies(prompt, model);
    made.append(element("div", {class: "pictures"}, ...numbers.map(n => picture(prompt, model, n, pictures[n], uris[n]))));
  }
  return made;
}

function card(prompt, found) {
  const title = element("div", {class: "title"}, element("h4", {}, prompt.prompt));
  if (models.length === 1) {
    const [pictures] = prompt.models;
    title.append(element("span", {class: "soft"}, `${pictures.filter(one => one.ok).length}/${pictures.length}`));
  }
  const columns = models.map((_, model) => model).filter(model => filter.model === "all" || filter.model === String(model));
  return element("article", {class: "card"}, title,
    element("div", {class: "columns"}, ...columns.map(model => column(prompt, model, found[model]))));
}

const total = found => found.reduce((sum, numbers) => sum + numbers.length, 0);

function section(task, entries) {
  const cards = element("div", {class: "cards"});
  const step = filter.task === "all" ? FEW : MANY;
  const more = element("button", {class: "more", type: "button"});
  let there = 0;
  function show(until) {
    const added = entries.slice(there, until).map(([prompt, found]) => card(prompt, found));
    cards.append(...added);
    there = Math.min(until, entries.length);
    shown[task] = there;
    more.textContent = `show more ${readable(task)} (${entries.length - there} prompts left)`;
    more.hidden = there === entries.length;
    return added;
  }
  more.onclick = () => show(there + MANY)[0].querySelector("button")?.focus();  // go on from the first new picture
  show(Math.max(step, shown[task] || 0));
  const pictures = entries.reduce((sum, [, found]) => sum + total(found), 0);
  return element("section", {class: "task"},
    element("div", {class: "title"}, element("h3", {}, readable(task)),
      element("span", {class: "soft"}, `${entries.length} prompts, ${pictures} pictures`)),
    cards, more);
}

function render() {
  const gallery = $("gallery");
  gallery.replaceChildren();
  let pictures = 0, asked = 0;
  for (const task of tasks) {
    const entries = prompts.filter(p => p.task === task).map(p => [p, matches(p)]).filter(([, found]) => total(found));
    if (entries.length) gallery.append(section(task, entries));
    pictures += entries.reduce((sum, [, found]) => sum + total(found), 0);
    asked += entries.length;
  }
  if (!pictures) gallery.append(element("p", {class: "none"}, "No picture fits these filters."));
  $("count").textContent = `${pictures} pictures of ${asked} prompts`;
}

// The filters are kept in the address, so that a view can be kept as a bookmark.
function remember() {
  const kept = Object.entries(filter).filter(([, value]) => value && value !== "all");
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}
function change(key, value) {
  filter[key] = value;
  for (const task of tasks) delete shown[task];
  remember();
  render();
}

function choices(id, key, options) {
  for (const [value, text] of options) {
    const button = element("button", {type: "button", "aria-pressed": value === filter[key]}, text);
    button.onclick = () => {
      for (const other of $(id).children) other.setAttribute("aria-pressed", other === button);
      change(key, value);
    };
    $(id).append(button);
  }
}

const given = new URLSearchParams(location.hash.slice(1));
const options = {
  task: [["all", "all tasks"], ...tasks.map(task => [task, readable(task)])],
  verdict: [["all", "all verdicts"], ["right", "right"], ["wrong", "wrong"], ...(all.some(bad) ? [["unreadable", "not readable"]] : [])],
  model: [["all", "all models"], ...models.map((name, number) => [String(number), name])],
};
for (const [key, known] of Object.entries(options)) if (known.some(([value]) => value === given.get(key))) filter[key] = given.get(key);
filter.words = (given.get("words") ?? "").trim().toLowerCase();
filter.differ = models.length > 1 && given.has("differ");

choices("tasks", "task", options.task);
choices("verdicts", "verdict", options.verdict);
if (models.length > 1) {
  choices("who", "model", options.model);
  const button = element("button", {type: "button", "aria-pressed": filter.differ, title: "prompts of which the models got different shares right"},
    "differ only");
  button.onclick = () => { change("differ", !filter.differ); button.setAttribute("aria-pressed", filter.differ); };
  $("differing").append(button);
}
$("words").value = filter.words;
$("words").oninput = event => change("words", event.target.value.trim().toLowerCase());
$("boxes").onchange = event => document.body.classList.toggle("plain", !event.target.checked);
$("close").onclick = () => $("large").close();
$("large").onclick = event => { if (event.target === $("large")) $("large").close(); };
render();
