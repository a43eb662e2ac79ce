// The service over fetch: the key, patience while it is busy, and its errors in words.

const TRIES = 6;
const KEY = "cellray-key";
const FINAL = [400, 403, 413, 415, 422];
const ADVICE = {
  401: "This service needs a key.",
  403: "The key does not allow this: ask for another one.",
  413: "The image is too large for this service: send a smaller one, or cut it into tiles.",
  415: "The service cannot read this file: choose an image.",
  429: "The service is busy and stayed so: try again in a minute.",
  500: "The service failed; its log has the cause. Try again, or tell who runs it.",
  503: "The service is not available just now: try again in a minute.",
  504: "The service took too long: try again, or ask for less at once.",
};

/** Set by the page. `key(why)` asks for a key → text, or null; `waiting(seconds)`; `times(path, milliseconds by name)`. */
export const on = { key: async () => null, waiting() {}, times() {} };

/** What went wrong, for a person. `status` 0: no answer at all. `final`: the same again is answered the same. */
export class Failure extends Error {
  constructor(status, said) {
    super(ADVICE[status] && said ? `${ADVICE[status]} (${said})` : ADVICE[status] || said);
    this.status = status;
    this.final = FINAL.includes(status);
  }
}

/** → {data, headers}: JSON, a Blob of an image, or bytes. Throws Failure, or AbortError. */
export async function call(path, { json, signal, ...options } = {}) {
  const headers = { ...options.headers };
  if (json) Object.assign(options, { method: "POST", body: JSON.stringify(json) });
  if (json) headers["content-type"] = "application/json";
  for (let tries = 1; ; tries++) {
    const key = sessionStorage.getItem(KEY);
    if (key) headers.authorization = `Bearer ${key}`;
    const started = performance.now(), answer = await reach(path, { ...options, headers, signal });
    if (answer.ok) {
      const data = await read(answer);
      on.times(path, times(answer.headers, performance.now() - started));
      return { data, headers: answer.headers };
    }
    const failure = new Failure(answer.status, await reason(answer));
    const seconds = Number(answer.headers.get("retry-after"));
    if (answer.status === 401 && (await newKey(key, failure.message))) continue;
    if (![429, 503].includes(answer.status) || !seconds || tries === TRIES) throw failure;
    on.waiting(seconds);
    await pause(seconds, signal);
  }
}

/** An image file's bytes → {id, image, size: [height, width]}. */
export async function embed(file, model, signal) {
  const options = { method: "POST", body: file, headers: { "content-type": "application/octet-stream" }, signal };
  const { headers } = await call(`v1/embed?pooled=true&model=${encodeURIComponent(model)}`, options);
  const [height, width] = headers.get("x-original-size").split(",").map(Number);
  return { id: headers.get("x-embedding-id"), image: headers.get("x-image-id"), width, height };
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The service does not answer: see that it runs and that you are connected, then try again.");
  }
}

function read(answer) {
  const kind = answer.headers.get("content-type") ?? "";
  return kind.includes("json") ? answer.json() : kind.startsWith("image/") ? answer.blob() : answer.arrayBuffer();
}

/** The service's own words; none from a proxy's page. */
async function reason(answer) {
  const body = await answer.json().catch(() => null);
  return body?.error ?? (ADVICE[answer.status] ? "" : `The answer was ${answer.status} ${answer.statusText}`);
}

/** Milliseconds; the network's are what was not spent in the service. */
function times(headers, trip) {
  const [inference, queue, total] = ["inference", "queue", "total"].map((name) => {
    const text = headers.get(`x-${name}-time`);
    return text === null ? null : Number(text);
  });
  return { inference, queue, network: total === null ? null : Math.max(trip - total, 0) };
}

let asking = null;

/** Whether there is a key other than the one that was refused; several calls ask once. */
async function newKey(refused, why) {
  if (sessionStorage.getItem(KEY) !== refused) return true;
  asking ??= on.key(refused ? `That key was refused: ${why}` : "This service asks for a key.").finally(() => (asking = null));
  const key = await asking;
  if (key) sessionStorage.setItem(KEY, key);
  return Boolean(key);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
