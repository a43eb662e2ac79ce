// Images of the data sets to pick from, a page at a time.

import { call } from "./api.js";

const PAGE = 24;
const THUMB = 256; // CSS pixels and those of fine screens
const lanes = [Promise.resolve(), Promise.resolve(), Promise.resolve()]; // so many previews are asked for at once
let place, pick, next;

/** Shows the first page, or nothing where there are no data sets. */
export function start(element, picked) {
  [place, pick, next] = [element, picked, ""];
  return more();
}

export async function more() {
  const { data } = await call(`v1/images?limit=${PAGE}${next && `&after=${encodeURIComponent(next)}`}`);
  next = data.next ?? "";
  place.querySelector("ul").append(...data.images.map(tile));
  place.querySelector("[data-do=more]").hidden = !next;
  place.hidden = !place.querySelector("li");
}

function tile(row, index) {
  const item = document.createElement("li"), button = document.createElement("button"), image = new Image();
  const name = row.image_uri.split("/").pop() + (row.part ? ` ${row.part}` : "");
  image.alt = "";
  button.append(image, Object.assign(document.createElement("span"), { textContent: name }));
  button.onclick = () => pick(row);
  item.append(button);
  const lane = index % lanes.length, show = async () => (image.src = await thumb(row.image_id));
  lanes[lane] = lanes[lane].then(show).catch(() => {}); // without one there is still the name
  return item;
}

/** Through fetch: an `img` cannot send the key. */
async function thumb(id) {
  return URL.createObjectURL((await call(`v1/images/${id}?size=${THUMB}`)).data);
}
