// The image that is open: a file of the user's, or one of a data set. It knows its embedding, and makes it again.

import { call, embed, Failure } from "./api.js";

const PREVIEW = 2048; // pixels: more than a screen shows

/** `width` × `height` as the service sees it; `bitmap` is drawn over that, or null where the browser cannot show it. */
export class Picture {
  #embeddings = new Map(); // by model
  #closed = new AbortController();

  /** As far as the browser can read it; `ready` tells the rest. */
  static async ofFile(file) {
    const bitmap = await drawn(file), { width = 0, height = 0 } = bitmap ?? {};
    return Object.assign(new Picture(), { name: file.name || "pasted image", file, bitmap, width, height });
  }

  static async ofDataset(row) {
    const { image_id: id, image_uri: uri, part, width, height, embedding_id, model } = row;
    const made = new Picture(), name = uri.split("/").pop() + (part ? ` ${part}` : "");
    Object.assign(made, { name, width, height, id, bitmap: await preview(id) });
    made.#embeddings.set(model, Promise.resolve({ id: embedding_id }));
    return made;
  }

  /** Has it embedded, and knows then what the service sees. Throws Failure. */
  async ready(model) {
    const { width, height, image } = await this.embedding(model);
    if (!this.file) return;
    Object.assign(this, { width, height, id: image });
    this.bitmap ??= await preview(image).catch(() => null); // of a format that only the service reads
  }

  /** Masks from `v1/segment` or `v1/automask`; an embedding that is gone is made again. Throws Failure, AbortError. */
  async ask(path, request, model, signal) {
    for (let again = Boolean(this.file); ; again = false) {
      const { id } = await this.embedding(model);
      signal.throwIfAborted();
      try {
        return (await call(path, { json: { ...request, embedding_id: id, model }, signal })).data;
      } catch (error) {
        if (error.status !== 404 || !again) throw error;
        this.#embeddings.delete(model);
      }
    }
  }

  /** Every cell: the pixels count, not the embedding. Throws Failure, AbortError. */
  async cells(options, model, signal) {
    const request = { ...options, prompts: "cells", model };
    if (!this.file) return (await call("v1/segment", { json: { ...request, image_id: this.id }, signal })).data;
    const body = new FormData();
    body.append("image", this.file, "image");
    body.append("request", JSON.stringify(request));
    return (await call("v1/segment", { method: "POST", body, signal })).data;
  }

  embedding(model) {
    if (!this.#embeddings.has(model)) {
      if (!this.file) throw new Failure(404, `${this.name} is not embedded by ${model} in the data set: choose another model.`);
      const made = embed(this.file, model, this.#closed.signal);
      made.catch(() => this.#embeddings.delete(model));
      this.#embeddings.set(model, made);
    }
    return this.#embeddings.get(model);
  }

  close() {
    this.#closed.abort();
    this.bitmap?.close();
  }
}

const drawn = (file) => createImageBitmap(file).catch(() => null);

async function preview(id) {
  return createImageBitmap((await call(`v1/images/${id}?size=${PREVIEW}`)).data);
}
