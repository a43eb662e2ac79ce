// The page: what each key, button and answer does.

import { call, on } from "./api.js";
import { coco, download, labelMap } from "./files.js";
import * as gallery from "./gallery.js";
import { listenToKeys } from "./keys.js";
import * as list from "./list.js";
import { answered, maskOf, Objects } from "./objects.js";
import { Picture } from "./picture.js";
import { listen } from "./pointer.js";
import { decode } from "./rle.js";
import { tenths, View } from "./view.js";
import { again, busy, problem, question, say } from "./words.js";

const STEP = 40, FINE = 4; // CSS pixels an arrow key
// Points a side, least predicted IoU and stability, most overlap: segment_anything's, and those of models for small
// images, whose scores are lower (serve_app/weights/nano/README.md).
const [SAM_GRID, SMALL_GRID] = [[32, 0.88, 0.95, 0.7], [16, 0.5, 0.7, 0.2]];
const SAM_SIZE = 1024; // pixels of the model's input
const $ = (id) => document.getElementById(id);
const each = (selector, run) => document.querySelectorAll(selector).forEach(run);

const objects = new Objects();
const view = new View($("canvas"), objects, () => ($("zoom").textContent = `${Math.round(100 * view.scale)} %`));
const asked = new Map(); // object's number → {prompt, controller}, in flight
const failed = new Set(); // prompts
let models = [];
let picture = null;
let opened = 0; // how many; the last one counts
let opening = false;
let everything = null; // AbortController while it runs

const tool = () => document.querySelector("[name=tool]:checked").value;
const model = () => $("model").value;
const findsCells = () => models.find((one) => one.name === model())?.cells;
const name = () => (picture ? `${picture.name} · ${picture.width} × ${picture.height}` : "");

const pointer = listen(view, tool, {
  point: addPoint,
  box: addBox,
  select: (at) => objects.select(objectAt(at)),
  over: (at) => ($("place").textContent = at && view.inside(at) ? at.map(Math.floor).join(", ") : ""),
});

// ---------------------------------------------------------------- what keys and buttons do

const act = {
  point: ({ shiftKey }) => {
    if (atCross()) addPoint(view.middle, shiftKey ? 0 : 1);
  },
  corner: () => {
    if (!atCross()) return;
    if (view.corner) addBox(view.boxed(view.corner, view.middle));
    view.corner = view.corner ? null : view.middle;
    followCorner();
  },
  move: ({ key, shiftKey }) => {
    const [dx, dy] = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[key];
    const step = shiftKey ? FINE : STEP;
    view.cross = true;
    view.pan(dx * step, dy * step);
    followCorner();
    if (picture) $("place").textContent = view.middle.map(Math.floor).join(", ");
  },
  finish: () => objects.finish(),
  undo: () => objects.undo(),
  redo: () => objects.redo(),
  previous: () => step(-1),
  next: () => step(1),
  rename: () => list.rename(objects.state.selected),
  delete: () => objects.selected && objects.remove(objects.state.selected),
  hide: () => objects.selected && objects.edit(objects.state.selected, { hidden: !objects.selected.hidden }),
  masks: () => {
    view.masks = !view.masks;
    view.draw();
    say(view.masks ? name() : "Masks are hidden; M shows them again.");
  },
  everything: ({ key }) => {
    if (!everything) segmentEverything();
    else if (!key) everything.abort(); // only the button stops it, and Escape
  },
  in: () => view.zoom(1.25),
  out: () => view.zoom(0.8),
  fit: () => view.fit(),
  actual: () => view.zoom(1 / view.scale),
  open: () => start(!picture || $("start").hidden),
  choose: () => $("file").click(),
  more: () => gallery.more(),
  help: () => $("help").showModal(),
  cancel: () => {
    everything?.abort();
    pointer.cancel();
    if (picture) start(false);
    problem(null);
  },
  again,
  dismiss: () => problem(null),
  coco: () => save("", "json", () => coco(picture, objects.list, model())),
  labels: () => save("-labels", "png", () => labelMap(picture, objects.list)),
  overlay: () => download_("-overlay", "png", () => view.flattened()),
};

listenToKeys(act, pointer.hold, $("keys"));
addEventListener("click", ({ target }) => {
  const button = target.closest("[data-do]");
  if (button) act[button.dataset.do]({});
});

function step(by) {
  const at = objects.list.indexOf(objects.selected), count = objects.list.length;
  if (count) objects.select(objects.list[at < 0 ? (by < 0 ? count - 1 : 0) : (at + by + count) % count].number);
}

function atCross() {
  view.cross = Boolean(picture);
  view.draw();
  return picture && view.inside(view.middle);
}

function followCorner() {
  view.box = view.corner && view.boxed(view.corner, view.middle);
  view.draw();
}

// ---------------------------------------------------------------- objects

function addPoint([x, y], label) {
  view.masks = true;
  objects.prompt(({ box, points }) => ({ box, points: [...points, [tenths(x), tenths(y), label]] }));
}

function addBox(box) {
  if (box[2] - box[0] < 1 || box[3] - box[1] < 1) return;
  if (objects.selected?.prompt.box) objects.finish();
  view.masks = true;
  objects.prompt(({ points }) => ({ box, points }));
}

/** The number of the smallest object there, or null. */
function objectAt([x, y]) {
  const there = objects.list.filter((one) => {
    if (one.hidden || !maskOf(one)) return false;
    const { x: left, y: top, width, height, plane } = decode(maskOf(one));
    const [column, row] = [Math.floor(x) - left, Math.floor(y) - top];
    return column >= 0 && row >= 0 && column < width && row < height && plane[row * width + column];
  });
  return there.sort((a, b) => maskOf(a).area - maskOf(b).area)[0]?.number ?? null;
}

/** Asks for each mask that is missing; of an object that was changed meanwhile, the older question is taken back. */
function ask() {
  for (const [number, { prompt, controller }] of asked) {
    if (objects.list.some((one) => one.prompt === prompt)) continue;
    controller.abort();
    asked.delete(number);
  }
  for (const { number, prompt } of objects.list) {
    if (answered(prompt) || failed.has(prompt) || asked.has(number)) continue;
    const controller = new AbortController();
    asked.set(number, { prompt, controller });
    askOne(number, prompt, controller.signal);
  }
}

async function askOne(number, prompt, signal) {
  const { box, points } = prompt, request = {};
  if (box) request.boxes = [box];
  if (points.length) request.points = [points.map(([x, y]) => [x, y])];
  if (points.length) request.labels = [points.map(([, , label]) => label)];
  try {
    const { masks } = await picture.ask("v1/segment", request, model(), signal);
    if (signal.aborted) return;
    problem(null);
    say(masks[0].area ? name() : "Nothing was found there: add a point, or drag a box.");
    objects.answer(prompt, masks[0]);
  } catch (error) {
    if (signal.aborted) return;
    failed.add(prompt);
    problem(error, () => (failed.clear(), ask()));
  } finally {
    if (!signal.aborted) asked.delete(number);
    refresh();
  }
}

async function segmentEverything() {
  if (!picture) return;
  const cells = findsCells();
  const given = [...document.querySelectorAll(cells ? ".cells input" : ".grid input")].filter((input) => input.value !== "");
  const request = Object.fromEntries(given.map((input) => [input.name, Number(input.value)]));
  const { signal } = (everything = new AbortController());
  say(cells ? "Segmenting every cell …" : "Segmenting everything …");
  refresh();
  try {
    const asking = cells ? picture.cells(request, model(), signal) : picture.ask("v1/automask", request, model(), signal);
    const { masks } = await asking;
    signal.throwIfAborted();
    const count = objects.found(masks);
    say(count ? `${count} ${cells ? "cells" : "objects"} found.` : "Nothing new passed the thresholds: lower the least scores under Options.");
  } catch (error) {
    if (signal.aborted) say("Stopped.");
    else problem(error, segmentEverything);
  } finally {
    everything = null;
    refresh();
  }
}

// ---------------------------------------------------------------- images

async function open(make) {
  if (objects.unsaved && !(await question("Open another image?", "The objects of this one are not downloaded.", "Discard"))) return;
  const mine = ++opened;
  problem(null);
  busy((opening = true));
  try {
    const made = await make();
    const shown = () => picture === made;
    if (mine !== opened) return made.close();
    if (made.bitmap) show(made);
    await made.ready(model());
    if (mine !== opened) return shown() || made.close();
    if (!shown()) show(made);
    else view.draw();
    say(made.bitmap ? name() : "The browser cannot draw this format. Its objects can be found all the same: segment everything.");
  } catch (error) {
    if (mine === opened) problem(error, () => open(make));
  } finally {
    if (mine === opened) opening = false;
    refresh();
  }
}

function show(made) {
  everything?.abort();
  picture?.close();
  picture = made;
  objects.clear();
  failed.clear();
  document.title = `${made.name} – Cellray`;
  start(false);
  view.show(made);
  $("canvas").focus({ preventScroll: true });
}

function start(visible) {
  $("start").hidden = !visible;
  if (visible) $("start").querySelector("button").focus();
}

function openFile(file) {
  if (file) open(() => Picture.ofFile(file));
}

function openRow(row) {
  if (models.some((one) => one.name === row.model)) choose(row.model);
  open(() => Picture.ofDataset(row));
}

$("file").onchange = ({ target }) => (openFile(target.files[0]), (target.value = ""));
addEventListener("paste", ({ clipboardData }) => openFile(clipboardData.files[0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("over", kind === "dragover");
    if (kind === "drop") openFile(event.dataTransfer.files[0]);
  });
}

// ---------------------------------------------------------------- downloads

async function download_(suffix, extension, make) {
  download(await make(), `${picture.name.replace(/\.\w+$/, "")}${suffix}.${extension}`);
}

async function save(...file) {
  await download_(...file);
  objects.saved();
}

addEventListener("beforeunload", (event) => objects.unsaved && event.preventDefault());

// ---------------------------------------------------------------- what the page says

objects.addEventListener("change", () => {
  ask();
  refresh();
});

function refresh() {
  const { list: all, selected } = objects, some = all.some(maskOf);
  list.show($("list"), $("row"), objects);
  $("count").textContent = all.length;
  $("none").hidden = all.length > 0;
  each("[data-do=undo]", (one) => (one.disabled = !objects.undoable));
  each("[data-do=redo]", (one) => (one.disabled = !objects.redoable));
  each("[data-do=finish]", (one) => (one.disabled = !selected));
  each(".take button", (one) => (one.disabled = !some));
  each("[data-do=everything]", (one) => {
    one.disabled = !picture;
    one.textContent = everything ? "Stop" : findsCells() ? "Segment every cell" : "Segment everything";
  });
  busy(opening || everything || asked.size > 0);
}

on.key = (why) => question("Key", why, "Use this key", true);
on.waiting = (seconds) => say(`The service is busy: trying again in ${seconds} s.`);
on.times = (path, { inference, queue, network }) => {
  const stage = path.startsWith("v1/embed?") ? "encoder" : /^v1\/(segment|automask)/.test(path) ? "decoder" : null;
  if (!stage) return;
  for (const [id, value] of [[stage, inference], ["queue", queue], ["network", network]]) {
    $(id).textContent = value === null ? "–" : `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
  }
};

// ---------------------------------------------------------------- models

$("model").onchange = () => {
  choose(model());
  picture?.ready(model()).catch((error) => problem(error));
};

function choose(name) {
  const { trained, note, warning, licence, runtime, image_size } = models.find((one) => one.name === name);
  $("model").value = name;
  each(".grid, .cells", (options) => (options.hidden = options.className !== (findsCells() ? "cells" : "grid")));
  document.querySelectorAll(".grid input").forEach((input, i) => (input.value = (image_size < SAM_SIZE ? SMALL_GRID : SAM_GRID)[i]));
  const facts = [licence, `${image_size} px`, runtime].map((text) => element("span", text));
  $("facts").replaceChildren(element("strong", trained ? "trained" : note, trained ? "good" : "bad"), ...facts);
  if (warning) $("facts").append(element("strong", warning, "bad"));
  refresh();
}

function element(name, textContent, className = "") {
  return Object.assign(document.createElement(name), { textContent, className });
}

async function load() {
  try {
    models = (await call("v1/models")).data;
    $("model").replaceChildren(...models.map((one) => new Option(one.name)));
    choose(models[0].name);
    await gallery.start($("gallery"), openRow);
  } catch (error) {
    problem(error, load);
  }
}

load();
