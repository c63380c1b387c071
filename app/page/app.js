// The page at `/`. No library and no build step: this file is what the browser runs.

import { makeWhole } from "./map.js";

const NEIGHBOURS = 24;
const ADD_BYTES = 24 * 2 ** 20; // of one request: progress is seen, and the server's limit is far
const ADD_IMAGES = 16;

const byId = (id) => document.getElementById(id);
const state = {
  collection: "default",
  collections: [],
  query: null, // {file} or {id, name}
  shown: 0,
  cursor: null,
  dropped: [],
  turn: 0, // counts views, so that a slow answer never overwrites a newer one
};

class Refusal extends Error {}

// -- talking to the service ------------------------------------------------------------------------------------

const key = () => sessionStorage.getItem("key");

async function call(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key()) headers.set("Authorization", `Bearer ${key()}`);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch {
    throw new Refusal("The service does not answer. Is it still running?");
  }
  if (answer.status === 401) {
    await askForKey();
    return call(path, options);
  }
  if (!answer.ok) {
    const problem = await answer.json().catch(() => ({}));
    throw new Refusal(problem.detail || `The service answered ${answer.status}.`);
  }
  return answer;
}

function askForKey() {
  const dialog = byId("key-dialog");
  if (!dialog.open) dialog.showModal();
  dialog.returnValue = "";
  return new Promise((resolve, reject) => {
    const closed = () => (dialog.returnValue ? resolve() : reject(new Refusal("Without an API key nothing can be shown.")));
    dialog.addEventListener("close", closed, { once: true });
  });
}

const collectionPath = () => `/collections/${encodeURIComponent(state.collection)}`;
const itemPath = (id) => `${collectionPath()}/items/${encodeURIComponent(id)}`;

async function showThumbnail(image, id) {
  image.addEventListener("error", () => image.classList.add("missing"), { once: true });
  const path = `${itemPath(id)}/thumbnail`;
  if (!key()) {
    image.src = path;
    return;
  }
  // A picture's address can't carry a key, so its bytes are fetched.
  try {
    image.src = URL.createObjectURL(await (await call(path)).blob());
    image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  } catch {
    image.classList.add("missing");
  }
}

const thumbnail = async (id) => createImageBitmap(await (await call(`${itemPath(id)}/thumbnail`)).blob());

// -- the collection --------------------------------------------------------------------------------------------

async function loadCollections() {
  const { model, data } = await (await call("/collections")).json();
  state.collections = data;
  if (!data.some((collection) => collection.name === state.collection) && data.length) {
    state.collection = data[0].name;
  }
  const choice = byId("collection");
  choice.replaceChildren(...data.map(({ name }) => new Option(name, name, false, name === state.collection)));
  byId("collection-choice").hidden = data.length < 2;
  byId("foot-model").textContent = `${model.id}, ${model.dimensions} dimensions`;
  const fingerprint = byId("foot-fingerprint");
  fingerprint.textContent = model.fingerprint.slice(0, 15) + "…";
  fingerprint.title = `${model.fingerprint} (click to copy)`;
  fingerprint.setAttribute("aria-label", `Copy the model's fingerprint, ${model.fingerprint}`);
  fingerprint.dataset.full = model.fingerprint;
  fingerprint.hidden = false;
  showCount();
}

const current = () => state.collections.find((collection) => collection.name === state.collection);
const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

function showCount() {
  const collection = current();
  byId("foot-items").textContent = collection ? `${counted(collection.items, "picture")} in “${collection.name}”` : "";
}

// -- what is on the right --------------------------------------------------------------------------------------

async function browse() {
  const turn = ++state.turn;
  leaveWhole();
  state.query = null;
  state.shown = 0;
  showQuery();
  const collection = current();
  const isForeign = Boolean(collection && !collection.searchable);
  const isEmpty = !collection || (collection.items === 0 && !isForeign);
  byId("foreign").hidden = !isForeign;
  byId("empty").hidden = !isEmpty;
  byId("grid").replaceChildren();
  byId("more").hidden = true;
  byId("results-title").textContent = isEmpty || isForeign ? "" : "In the collection";
  byId("results-note").textContent = isEmpty || isForeign ? "" : "Choose one to see its neighbours";
  if (isForeign) return explainForeign(collection);
  if (isEmpty) return explainEmpty();
  const page = await (await call(`${collectionPath()}/items?limit=${NEIGHBOURS}`)).json();
  if (turn === state.turn) showItems(page);
}

function showItems(page) {
  state.cursor = page.next_cursor;
  byId("grid").append(...page.data.map((item) => card(item)));
  byId("more").hidden = !state.cursor;
}

function explainEmpty() {
  const into = state.collection === "default" ? "" : ` --collection ${state.collection}`;
  const port = location.port || (location.protocol === "https:" ? "443" : "80");
  const server = port === "8000" ? "" : ` --server ${location.origin}`;
  byId("command").textContent = `dino-serve index add path/to/pictures${into}${server}`;
}

function explainForeign(collection) {
  byId("foreign-say").textContent =
    `“${collection.name}” holds ${counted(collection.items, "picture")} as another model sees them, so they can’t be ` +
    "compared with this one’s. Serve that model again, or make a new collection for this model and add the pictures to it.";
}

function nameOf(item) {
  // An item that was added without an id has its content's hash for one, which tells nobody anything.
  const isHash = /^[0-9a-f]{64}$/.test(item.id);
  const name = isHash ? (item.metadata?.filename ?? item.id.slice(0, 12)) : item.id;
  return name.split("/").slice(-2).join("/");
}

function card(item) {
  const name = nameOf(item);
  const entry = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.className = "card";
  button.title = item.id;
  const frame = document.createElement("span");
  frame.className = "frame";
  const image = document.createElement("img");
  image.alt = "";
  image.loading = "lazy";
  frame.append(image);
  showThumbnail(image, item.id);
  const label = document.createElement("span");
  label.className = "label";
  label.append(span("name", name));
  button.append(frame, label);
  if (item.score === undefined) {
    button.setAttribute("aria-label", `${name}. Find its neighbours`);
  } else {
    const score = item.score.toFixed(2);
    label.append(span("score", score));
    const bar = span("bar", "");
    bar.style.setProperty("--score", Math.max(0, item.score).toFixed(4));
    button.append(bar);
    button.setAttribute("aria-label", `${name}, similarity ${score}. Find its neighbours`);
  }
  button.addEventListener("click", () => openItem(item.id, name));
  entry.append(button);
  return entry;
}

function span(className, text) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}

// -- searching -------------------------------------------------------------------------------------------------

function request(query, offset) {
  const parameters = { k: NEIGHBOURS, offset, collection: state.collection };
  if (query.id !== undefined) {
    return [
      "/similar",
      {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...parameters, id: query.id }),
      },
    ];
  }
  const type = query.file.type.startsWith("image/") ? query.file.type : "application/octet-stream";
  const headers = { "Content-Type": type };
  return [`/similar?${new URLSearchParams(parameters)}`, { method: "POST", headers, body: query.file }];
}

async function search(query) {
  const turn = ++state.turn;
  leaveWhole();
  state.query = query;
  state.shown = 0;
  say("");
  showQuery();
  document.body.classList.add("busy");
  try {
    const found = (await (await call(...request(query, 0))).json()).data[0];
    if (turn !== state.turn) return;
    byId("empty").hidden = found.neighbours.length > 0;
    byId("foreign").hidden = true;
    if (!found.neighbours.length) explainEmpty();
    byId("grid").replaceChildren();
    byId("results-title").textContent = found.neighbours.length ? "Neighbours" : "";
    byId("results-note").textContent = found.neighbours.length ? "nearest first, by cosine similarity" : "";
    showNeighbours(found.neighbours);
    tell(found.neighbours);
    if (matchMedia("(max-width: 820px)").matches && found.neighbours.length) {
      byId("drop").scrollIntoView({ block: "start", behavior: "smooth" });
    }
  } catch (error) {
    if (turn === state.turn) say(error.message);
  } finally {
    if (turn === state.turn) document.body.classList.remove("busy");
  }
}

function showNeighbours(neighbours) {
  byId("grid").append(...neighbours.map(card));
  state.shown += neighbours.length;
  byId("more").hidden = neighbours.length < NEIGHBOURS || state.shown + NEIGHBOURS > 1000;
}

function tell(neighbours) {
  byId("spoken").textContent = neighbours.length
    ? `${counted(neighbours.length, "neighbour")}. Nearest: ${nameOf(neighbours[0])}, similarity ${neighbours[0].score.toFixed(2)}.`
    : "No neighbours.";
}

async function showMore() {
  const turn = state.turn;
  const button = byId("more");
  button.disabled = true;
  try {
    if (state.query) {
      const more = await (await call(...request(state.query, state.shown))).json();
      if (turn === state.turn) showNeighbours(more.data[0].neighbours);
    } else {
      const parameters = new URLSearchParams({ limit: NEIGHBOURS, cursor: state.cursor });
      const page = await (await call(`${collectionPath()}/items?${parameters}`)).json();
      if (turn === state.turn) showItems(page);
    }
  } catch (error) {
    say(error.message);
  } finally {
    button.disabled = false;
  }
}

function showQuery() {
  const query = state.query;
  byId("drop").classList.toggle("has-query", Boolean(query));
  byId("drop-idle").hidden = Boolean(query);
  byId("query").hidden = !query;
  byId("several").hidden = true;
  document.body.classList.remove("busy");
  if (!query) return;
  const image = byId("query-image").cloneNode();
  image.removeAttribute("src");
  image.className = "";
  byId("query-image").replaceWith(image);
  byId("query-name").textContent = query.name;
  byId("keep").hidden = query.id !== undefined;
  if (query.id !== undefined) {
    image.alt = query.name;
    byId("query-note").textContent = "from the collection";
    showThumbnail(image, query.id);
    return;
  }
  image.alt = "Your picture";
  byId("query-note").textContent = "";
  image.addEventListener("error", () => image.classList.add("missing"), { once: true });
  image.addEventListener("load", () => {
    byId("query-note").textContent = `${image.naturalWidth} × ${image.naturalHeight}`;
    URL.revokeObjectURL(image.src);
  }, { once: true });
  image.src = URL.createObjectURL(query.file);
}

function searchByFile(file) {
  history.pushState({ file: true }, "", location.pathname + collectionQuery());
  return search({ file, name: file.name || "Pasted picture" });
}

function openItem(id, name) {
  history.pushState({}, "", `?${new URLSearchParams({ ...collectionState(), id })}`);
  window.scrollTo({ top: 0 });
  return search({ id, name });
}

const collectionState = () => (state.collection === "default" ? {} : { collection: state.collection });
function collectionQuery() {
  const text = new URLSearchParams(collectionState()).toString();
  return text ? `?${text}` : "";
}

// -- the whole -------------------------------------------------------------------------------------------------

const whole = makeWhole({ call, collectionPath, itemPath, thumbnail, card, counted, nameOf, openItem });

function showWhole() {
  ++state.turn;
  state.query = null;
  say("");
  byId("main").hidden = true;
  byId("whole").hidden = false;
  byId("whole-link").setAttribute("aria-current", "page");
  return whole.show();
}

function leaveWhole() {
  whole.hide();
  byId("main").hidden = false;
  byId("whole").hidden = true;
  byId("whole-link").removeAttribute("aria-current");
}

function openWhole(event) {
  event.preventDefault();
  history.pushState({}, "", `?${new URLSearchParams({ ...collectionState(), view: "map" })}`);
  window.scrollTo({ top: 0 });
  return showWhole().catch(sayOfWhole);
}

function sayOfWhole(error) {
  byId("map-note").textContent = error.message;
}

// -- adding ----------------------------------------------------------------------------------------------------

function portions(files) {
  const found = [];
  let bytes = Infinity;
  for (const file of files) {
    if (bytes + file.size > ADD_BYTES || found.at(-1).length >= ADD_IMAGES) {
      found.push([]);
      bytes = 0;
    }
    found.at(-1).push(file);
    bytes += file.size;
  }
  return found;
}

async function add(files) {
  say("");
  byId("several").hidden = true;
  byId("added").hidden = true;
  byId("adding").hidden = false;
  const bar = byId("adding-bar");
  bar.max = files.length;
  bar.value = 0;
  const counts = { added: 0, updated: 0, unchanged: 0 };
  const failures = [];
  try {
    for (const portion of portions(files)) {
      byId("adding-say").textContent = `Adding ${bar.value + 1} of ${files.length}`;
      const form = new FormData();
      for (const file of portion) form.append("images", file, file.name || "picture");
      const { data } = await (await call(`${collectionPath()}/items`, { method: "POST", body: form })).json();
      for (const { index, status, error } of data) {
        if (error) failures.push(`${portion[index].name}: ${error.title}`);
        else counts[status] += 1;
      }
      bar.value += portion.length;
    }
  } catch (error) {
    say(error.message);
  }
  byId("adding").hidden = true;
  showAdded(counts, failures);
  await loadCollections();
  if (!state.query) await browse();
}

function showAdded(counts, failures) {
  const parts = [`${counted(counts.added, "picture")} added`];
  if (counts.updated) parts.push(`${counts.updated} updated`);
  if (counts.unchanged) parts.push(`${counts.unchanged} already there`);
  if (failures.length) parts.push(`${failures.length} left out`);
  const text = `${parts.join(", ")}.`;
  byId("added-say").textContent = text;
  byId("spoken").textContent = text;
  byId("added-failures").replaceChildren(
    ...failures.slice(0, 20).map((failure) => {
      const entry = document.createElement("li");
      entry.textContent = failure;
      return entry;
    }),
  );
  byId("added").hidden = false;
}

// -- hands and keys --------------------------------------------------------------------------------------------

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

function take(files) {
  if (files.length === 1) return searchByFile(files[0]);
  if (files.length > 1) {
    state.dropped = files;
    byId("several-say").textContent = `You gave ${files.length} pictures. Add them to the collection?`;
    byId("several").hidden = false;
    byId("several-add").focus();
  }
}

function onClick(id, act) {
  byId(id).addEventListener("click", () => Promise.resolve(act()).catch((error) => say(error.message)));
}

function listen() {
  onClick("choose", () => byId("search-file").click());
  onClick("another", () => byId("search-file").click());
  onClick("add", () => byId("add-files").click());
  onClick("clear", start);
  onClick("more", showMore);
  onClick("keep", () => add([state.query.file]));
  onClick("several-add", () => add(state.dropped));
  onClick("several-search", () => searchByFile(state.dropped[0]));
  onClick("several-cancel", () => { byId("several").hidden = true; });
  onClick("copy", () => copy(byId("command").textContent, byId("copy")));
  onClick("foot-fingerprint", () => copy(byId("foot-fingerprint").dataset.full, byId("foot-fingerprint")));
  onClick("key-use", useKey);
  byId("groups-more").addEventListener("click", () => whole.more().catch(sayOfWhole));
  byId("threshold").addEventListener("change", () => whole.refresh().catch(sayOfWhole));
  byId("whole-link").addEventListener("click", openWhole);
  byId("key").addEventListener("keydown", (event) => { if (event.key === "Enter") useKey(); });
  for (const [id, act] of [["search-file", take], ["add-files", add]]) {
    byId(id).addEventListener("change", (event) => {
      const files = [...event.target.files];
      event.target.value = ""; // so that the same file can be chosen again
      if (files.length) act(files);
    });
  }
  byId("collection").addEventListener("change", (event) => {
    state.collection = event.target.value;
    showCount();
    if (byId("whole").hidden) start();
    else byId("whole-link").click();
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (files.length) {
      event.preventDefault();
      take(files);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && (state.query || !byId("whole").hidden) && !byId("key-dialog").open) start();
  });
  listenForDrops();
  window.addEventListener("popstate", open);
}

function listenForDrops() {
  let depth = 0; // dragenter and dragleave come for every element on the way
  const over = (change) => {
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("over", depth > 0);
  };
  document.addEventListener("dragenter", (event) => { event.preventDefault(); over(1); });
  document.addEventListener("dragleave", () => over(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    over(0);
    take([...event.dataTransfer.files]);
  });
}

function useKey() {
  const typed = byId("key").value.trim();
  if (!typed) return;
  sessionStorage.setItem("key", typed);
  byId("key").value = "";
  byId("key-dialog").close("used");
}

async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => { button.textContent = before; }, 1400);
}

function start() {
  history.pushState({}, "", location.pathname + collectionQuery());
  say("");
  return browse().catch((error) => say(error.message));
}

async function open() {
  const turn = ++state.turn;
  try {
    const parameters = new URLSearchParams(location.search);
    state.collection = parameters.get("collection") ?? "default";
    await loadCollections();
    if (turn !== state.turn) return; // a picture was chosen meanwhile, and its neighbours stay
    const id = parameters.get("id");
    if (parameters.get("view") === "map") await showWhole().catch(sayOfWhole);
    else if (id === null) await browse();
    else await search({ id, name: nameOf({ id }) });
  } catch (error) {
    say(error.message);
  }
}

listen();
open();
