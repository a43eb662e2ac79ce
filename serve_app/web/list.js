// The list of objects: one row each, kept while its object is, so that focus stays where it was.

import { answered, maskOf } from "./objects.js";
import { colour } from "./view.js";

const rows = new Map(); // by the object's number

/** Brings the list up to date. */
export function show(list, template, objects) {
  const numbers = new Set(objects.list.map((one) => one.number));
  for (const [number, row] of rows) {
    if (numbers.has(number)) continue;
    const next = row.contains(document.activeElement) && (row.nextElementSibling ?? row.previousElementSibling);
    row.remove();
    rows.delete(number);
    if (next) next.querySelector(".delete").focus();
  }
  objects.list.forEach((one, index) => {
    if (!rows.has(one.number)) rows.set(one.number, made(template, one.number, objects));
    const row = rows.get(one.number);
    if (list.children[index] !== row) list.insertBefore(row, list.children[index] ?? null);
    const select = one === objects.selected;
    if (select && row.ariaCurrent !== "true") reveal(list, row);
    fill(row, one, select);
  });
}

export function rename(number) { rows.get(number)?.querySelector(".label").select(); }

/** In the list alone: the page stays where it is. */
function reveal(list, row) {
  const [frame, place] = [list, row].map((one) => one.getBoundingClientRect());
  list.scrollTop += Math.min(place.top - frame.top, 0) + Math.max(place.bottom - frame.bottom, 0);
}

function made(template, number, objects) {
  const row = template.content.cloneNode(true).firstElementChild, part = (name) => row.querySelector(`.${name}`);
  const find = () => objects.list.find((one) => one.number === number);
  row.style.setProperty("--colour", colour(number));
  row.querySelector("b").textContent = number;
  part("pick").setAttribute("aria-label", `Select object ${number}`);
  part("label").setAttribute("aria-label", `Label of object ${number}`);
  part("hide").setAttribute("aria-label", `Hide object ${number}`);
  part("delete").setAttribute("aria-label", `Delete object ${number}`);
  part("pick").onclick = () => objects.select(find() === objects.selected ? null : number);
  part("hide").onclick = () => objects.edit(number, { hidden: !find().hidden });
  part("delete").onclick = () => objects.remove(number);
  part("label").onchange = ({ target }) => {
    const label = target.value.trim();
    if (label && label !== find().label) objects.edit(number, { label });
    else target.value = find().label;
  };
  part("label").onkeydown = ({ key, target }) => {
    if (key === "Escape") target.value = find().label;
    if (key === "Escape" || key === "Enter") target.blur();
  };
  return row;
}

function fill(row, one, selected) {
  const part = (name) => row.querySelector(`.${name}`), mask = maskOf(one), input = part("label");
  row.ariaCurrent = String(selected);
  row.classList.toggle("hidden", one.hidden);
  row.classList.toggle("asking", !answered(one.prompt));
  part("pick").ariaPressed = String(selected);
  part("hide").ariaPressed = String(one.hidden);
  if (input !== document.activeElement) input.value = one.label;
  part("score").textContent = mask ? mask.predicted_iou.toFixed(2) : "";
  const [name, value] = mask?.box_score == null ? ["stability", mask?.stability_score] : ["box", mask.box_score];
  part("score").title = mask ? `predicted IoU; ${name} ${value.toFixed(2)}` : "";
  part("area").textContent = mask ? `${mask.area.toLocaleString("en")} px` : "";
}
