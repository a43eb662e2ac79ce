// The objects, and all that was done to them. States and prompts are never changed in place, so that undo is to go back.

/** What an object is asked by: `box` [x0, y0, x1, y1] or null, `points` of [x, y, 1 on it or 0 off it]. */
export const EMPTY = { box: null, points: [], before: null };

const masks = new WeakMap(); // of prompts

/** The mask of an object; while it is asked anew, the one before, or none. */
export function maskOf({ prompt }) {
  while (prompt && !masks.has(prompt)) prompt = prompt.before;
  return prompt ? masks.get(prompt) : null;
}

export const answered = (prompt) => masks.has(prompt);

/** `state`: {list: [{number, label, hidden, prompt}], selected: a number or null}. Clicks go to the selected object. */
export class Objects extends EventTarget {
  state = { list: [], selected: null };
  #past = [];
  #future = [];
  #number = 0;
  #label = "object";
  #saved = this.state.list;

  get list() { return this.state.list; }
  get selected() { return this.list.find((one) => one.number === this.state.selected) ?? null; }
  get undoable() { return this.#past.length > 0; }
  get redoable() { return this.#future.length > 0; }
  get unsaved() { return this.list.length > 0 && this.list !== this.#saved; }

  /** One more click or box for the selected object, or the first of a new one. */
  prompt(change) {
    const before = this.selected?.prompt ?? EMPTY, prompt = { ...change(before), before };
    if (this.selected) return this.edit(this.selected.number, { prompt, hidden: false });
    const made = this.#object(prompt);
    this.#step({ list: [...this.list, made], selected: made.number });
  }

  /** An answer of the service. No step of its own: it belongs to the click. */
  answer(prompt, mask) {
    masks.set(prompt, mask);
    this.#tell();
  }

  /** Objects found without a click, in place of those found so before and not touched since. */
  found(list) {
    const kept = this.list.filter((one) => !one.found);
    const fresh = list.filter((mask) => !kept.some((one) => maskOf(one) && overlap(maskOf(one).bbox, mask.bbox) > 0.8));
    const made = fresh.map((mask) => {
      const [x, y, width, height] = mask.bbox;
      const prompt = { box: [x, y, x + width, y + height], points: [], before: null };
      masks.set(prompt, mask);
      return { ...this.#object(prompt), found: true };
    });
    this.#step({ list: [...kept, ...made], selected: null });
    return made.length;
  }

  edit(number, change) {
    if (change.label) this.#label = change.label;
    const list = this.list.map((one) => (one.number === number ? { ...one, ...change, found: false } : one));
    this.#step({ list, selected: this.state.selected });
  }

  remove(number) {
    const list = this.list.filter((one) => one.number !== number);
    this.#step({ list, selected: this.state.selected === number ? null : this.state.selected });
  }

  finish() {
    if (this.selected) this.#step({ ...this.state, selected: null });
  }

  select(number) {
    this.state = { ...this.state, selected: number };
    this.#tell();
  }

  undo() { this.#travel(this.#past, this.#future); }
  redo() { this.#travel(this.#future, this.#past); }
  saved() { this.#saved = this.list; }

  clear() {
    this.state = { list: [], selected: null };
    this.#past = [];
    this.#future = [];
    this.#number = 0;
    this.#tell();
  }

  #object(prompt) { return { number: ++this.#number, label: this.#label, hidden: false, prompt }; }

  #step(state) {
    this.#past.push(this.state);
    this.#future = [];
    this.state = state;
    this.#tell();
  }

  #travel(from, to) {
    if (!from.length) return;
    to.push(this.state);
    this.state = from.pop();
    this.#tell();
  }

  #tell() { this.dispatchEvent(new Event("change")); }
}

/** IoU of two boxes (x, y, width, height). */
function overlap([ax, ay, aw, ah], [bx, by, bw, bh]) {
  const width = Math.min(ax + aw, bx + bw) - Math.max(ax, bx), height = Math.min(ay + ah, by + bh) - Math.max(ay, by);
  const both = Math.max(width, 0) * Math.max(height, 0);
  return both / (aw * ah + bw * bh - both || 1);
}
