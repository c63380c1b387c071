// The collection as a whole: its map, what it is made of, and its duplicates. app.js says when.

const POINTS = 20000;
const CLUSTERS = 10; // at a time
const GROUPS = 12; // of duplicates, at a time
const THUMBNAIL_PX = 52; // of those that lie on the map, at most
const THUMBNAIL_SHARE = 1 / 11; // of the map's shorter side
const THUMBNAILS = 90; // at a time
const REACH_PX = 22; // how far from a point a finger or a mouse may be
const MAX_ZOOM = 60;

const byId = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

/**
 * @param page What app.js lends: call, collectionPath, itemPath, thumbnail, card, counted, nameOf, openItem.
 */
export function makeWhole(page) {
  let turn = 0; // as in app.js: a slow answer never overwrites a newer one
  const map = makeMap(page);

  // Asks until there is an answer, and again until it is a fresh one; `show` sees each.
  async function follow(path, progress, show, isWanted = () => true) {
    const mine = turn;
    const goesOn = () => mine === turn && isWanted();
    let shown = null;
    while (goesOn()) {
      const answer = await page.call(`${page.collectionPath()}/${path}`);
      const reading = await answer.json();
      if (!goesOn()) return;
      progress(reading);
      if (reading.state === "ready" && reading.computed_at !== shown) {
        shown = reading.computed_at;
        show(reading);
      }
      if (reading.state === "ready" && !reading.stale) return;
      await pause(Math.min(5, Number(answer.headers.get("Retry-After") ?? 2)));
    }
  }

  const duplicates = makeDuplicates(page, follow);

  return {
    async show() {
      turn += 1;
      map.clear();
      byId("clusters").replaceChildren();
      byId("clusters-more").hidden = true;
      // The quick ones first: they are computed one after the other.
      const all = [
        duplicates.show(),
        follow("clusters?labels=true", tell("clusters-note"), (reading) => {
          showClusters(page, reading);
          map.colour(reading);
        }),
        follow(`map?limit=${POINTS}`, tell("map-note"), map.show),
      ];
      await Promise.all(all);
    },
    refresh: duplicates.show,
    more: duplicates.more,
    hide() {
      turn += 1;
      map.clear();
    },
  };
}

function tell(id) {
  return ({ state, stale, progress }) => {
    const share = progress === null ? "" : ` ${Math.round(progress * 100)} %`;
    const news = progress === null ? "" : `; a new reading is on its way,${share}`;
    const texts = { computing: `Computing…${share}`, ready: stale ? `As it was before the last change${news}` : "" };
    byId(id).textContent = texts[state];
  };
}

function showClusters(page, { data }, from = 0) {
  if (!from) byId("clusters").replaceChildren();
  const more = byId("clusters-more");
  more.hidden = data.length <= from + CLUSTERS;
  more.onclick = () => showClusters(page, { data }, from + CLUSTERS);
  byId("clusters").append(
    ...data.slice(from, from + CLUSTERS).map((cluster, nth) => {
      const place = from + nth;
      const row = document.createElement("li");
      const head = document.createElement("p");
      head.className = "strip-head";
      const dot = document.createElement("span");
      dot.className = "dot";
      dot.style.setProperty("background", colourOf(place));
      const size = document.createElement("span");
      size.textContent = page.counted(cluster.size, "picture");
      const note = document.createElement("span");
      note.className = "quiet";
      note.textContent = `cohesion ${cluster.cohesion.toFixed(2)}`;
      head.append(dot, size, note);
      row.append(head, strip(page, cluster.representatives));
      return row;
    }),
  );
}

function strip(page, ids, labelOf = () => "") {
  const list = document.createElement("ul");
  list.className = "strip";
  list.append(
    ...ids.map((id) => {
      const entry = page.card({ id });
      const label = labelOf(id);
      if (label) {
        const said = document.createElement("span");
        said.className = "badge";
        said.textContent = label;
        entry.querySelector(".frame").append(said);
      }
      return entry;
    }),
  );
  return list;
}

function makeDuplicates(page, follow) {
  let cursor = null;
  let asked = 0; // a slider that is moved asks again
  const threshold = () => Number(byId("threshold").value);
  const path = (more) => {
    const parameters = new URLSearchParams({ threshold: threshold(), limit: GROUPS });
    if (more) parameters.set("cursor", more);
    return `duplicates?${parameters}`;
  };

  function append(reading) {
    cursor = reading.next_cursor;
    byId("groups").append(...reading.data.map((group) => groupRow(page, group)));
    byId("groups-more").hidden = !cursor;
    byId("groups-say").textContent = reading.total_groups
      ? `${page.counted(reading.total_groups, "group")} of ${page.counted(reading.total_items, "picture")} in all, the surest first`
      : "No two pictures are that much alike.";
  }

  byId("threshold").addEventListener("input", () => {
    byId("threshold-value").textContent = threshold().toFixed(3);
  });

  return {
    show() {
      const mine = ++asked;
      byId("threshold-value").textContent = threshold().toFixed(3);
      byId("groups-say").textContent = "";
      byId("groups-more").hidden = true;
      byId("groups").replaceChildren();
      const show = (reading) => {
        byId("groups").replaceChildren();
        append(reading);
      };
      return follow(path(null), tell("groups-note"), show, () => mine === asked);
    },
    async more() {
      const mine = asked;
      const reading = await (await page.call(`${page.collectionPath()}/${path(cursor)}`)).json();
      if (mine === asked) append(reading);
    },
  };
}

function groupRow(page, group) {
  const row = document.createElement("li");
  const head = document.createElement("p");
  head.className = "strip-head";
  const size = document.createElement("span");
  size.textContent = page.counted(group.size, "picture");
  const note = document.createElement("span");
  note.className = "quiet";
  note.textContent = group.exact ? "the same file" : `similarity ${group.min_score.toFixed(3)} at least`;
  head.append(size, note);
  row.append(head, strip(page, group.ids.slice(0, 24), (id) => (id === group.keep ? "keep" : "")));
  return row;
}

// Neighbouring numbers get distant hues: the golden angle.
function colourOf(place) {
  const lightness = matchMedia("(prefers-color-scheme: dark)").matches ? 0.76 : 0.6;
  return `oklch(${lightness} 0.13 ${(place * 137.508 + 165) % 360})`;
}

// -- the canvas ------------------------------------------------------------------------------------------------

function makeMap(page) {
  const canvas = byId("map");
  const pen = canvas.getContext("2d");
  const view = { x: 0, y: 0, zoom: 1 }; // the middle, in the map's units, and how near
  const thumbnails = new Map(); // id -> bitmap, or null while it loads or where there is none
  let points = null; // {ids, rows, x, y, seq}
  let clusters = null; // {labels, seq}
  let colours = [];
  let near = -1;
  let isAsked = false;

  const scale = () => (Math.min(canvas.clientWidth, canvas.clientHeight) / 2 - 18) * view.zoom;
  const thumbnailPx = () =>
    Math.min(THUMBNAIL_PX, Math.min(canvas.clientWidth, canvas.clientHeight) * THUMBNAIL_SHARE);
  const toScreen = (index) => [
    canvas.clientWidth / 2 + (points.x[index] - view.x) * scale(),
    canvas.clientHeight / 2 - (points.y[index] - view.y) * scale(),
  ];

  function draw() {
    if (isAsked) return;
    isAsked = true;
    requestAnimationFrame(() => {
      isAsked = false;
      paint();
    });
  }

  function paint() {
    const ratio = devicePixelRatio;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    pen.scale(ratio, ratio);
    if (!points) return;
    const seen = paintDots();
    paintThumbnails(seen);
    if (near >= 0) {
      const [x, y] = toScreen(near);
      pen.lineWidth = 2;
      pen.strokeStyle = getComputedStyle(canvas).color;
      pen.beginPath();
      pen.arc(x, y, 7, 0, 2 * Math.PI);
      pen.stroke();
    }
  }

  function paintDots() {
    const seen = [];
    const size = Math.min(9, (points.ids.length > 5000 ? 2.5 : 4) * Math.sqrt(view.zoom));
    const labels = clusters?.seq === points.seq ? clusters.labels : null;
    const plain = getComputedStyle(canvas).color;
    points.ids.forEach((_, index) => {
      const [x, y] = toScreen(index);
      if (x < -size || y < -size || x > canvas.clientWidth + size || y > canvas.clientHeight + size) return;
      seen.push([index, x, y]);
    });
    pen.globalAlpha = 0.75;
    for (const [index, x, y] of seen) {
      pen.fillStyle = labels ? colours[labels[points.rows[index]]] : plain;
      if (seen.length > 6000) pen.fillRect(x - size / 2, y - size / 2, size, size); // three times as fast
      else {
        pen.beginPath();
        pen.arc(x, y, size / 2, 0, 2 * Math.PI);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
    return seen;
  }

  // One picture for each cell of a grid that moves with the map, so that none jumps while it is dragged.
  function paintThumbnails(seen) {
    const cell = thumbnailPx() * 1.15;
    const step = cell / scale();
    const taken = new Set();
    for (const [index, x, y] of seen) {
      const [across, down] = [points.x[index] / step, points.y[index] / step];
      const at = `${Math.floor(across)} ${Math.floor(down)}`;
      // Near the middle of its cell, so that it hardly covers the next one's.
      const off = Math.max(Math.abs(across - Math.floor(across) - 0.5), Math.abs(down - Math.floor(down) - 0.5));
      if (off > 0.3 || taken.has(at) || taken.size >= THUMBNAILS) continue;
      taken.add(at);
      paintThumbnail(points.ids[index], x, y);
    }
  }

  function paintThumbnail(id, x, y) {
    if (!thumbnails.has(id)) {
      thumbnails.set(id, null);
      page.thumbnail(id).then((bitmap) => {
        thumbnails.set(id, bitmap);
        draw();
      }, () => {});
    }
    const bitmap = thumbnails.get(id);
    if (!bitmap) return;
    const factor = thumbnailPx() / Math.max(bitmap.width, bitmap.height);
    const [width, height] = [bitmap.width * factor, bitmap.height * factor];
    pen.drawImage(bitmap, x - width / 2, y - height / 2, width, height);
  }

  function nearest(event) {
    if (!points) return -1;
    const box = canvas.getBoundingClientRect();
    let [best, distance] = [-1, REACH_PX];
    points.ids.forEach((_, index) => {
      const [x, y] = toScreen(index);
      const found = Math.hypot(x - event.clientX + box.left, y - event.clientY + box.top);
      if (found < distance) [best, distance] = [index, found];
    });
    return best;
  }

  function point(index) {
    if (index === near) return;
    near = index;
    const card = byId("map-card");
    card.hidden = near < 0;
    if (near >= 0) {
      const [x, y] = toScreen(near);
      card.classList.toggle("left", x > canvas.clientWidth / 2);
      card.classList.toggle("above", y > canvas.clientHeight / 2);
      card.style.setProperty("--x", `${x}px`);
      card.style.setProperty("--y", `${y}px`);
      card.replaceChildren(page.card({ id: points.ids[near] }).firstChild);
    }
    draw();
  }

  function zoom(factor, event) {
    const box = canvas.getBoundingClientRect();
    const dx = event ? event.clientX - box.left - canvas.clientWidth / 2 : 0;
    const dy = event ? event.clientY - box.top - canvas.clientHeight / 2 : 0;
    const before = scale();
    view.zoom = Math.min(MAX_ZOOM, Math.max(1, view.zoom * factor));
    // What is under the pointer stays there.
    move(dx / before - dx / scale(), dy / before - dy / scale());
  }

  function move(x, y) {
    const most = 1 - 1 / view.zoom + 0.1;
    view.x = Math.min(most, Math.max(-most, view.x + x));
    view.y = Math.min(most, Math.max(-most, view.y - y));
    point(-1);
    draw();
  }

  listen(canvas, { zoom, move, scale, point, nearest, open: (index) => {
    const id = points.ids[index];
    page.openItem(id, page.nameOf({ id }));
  } });
  new ResizeObserver(draw).observe(canvas);
  byId("map-nearer").addEventListener("click", () => zoom(1.6));
  byId("map-farther").addEventListener("click", () => zoom(1 / 1.6));

  return {
    show(reading) {
      points = reading;
      canvas.setAttribute("aria-label", `A map of ${page.counted(reading.items, "picture")}: those that look alike are near each other`);
      byId("map-say").textContent =
        reading.ids.length < reading.total
          ? `${page.counted(reading.ids.length, "picture")} of ${reading.total.toLocaleString("en")} are drawn`
          : page.counted(reading.total, "picture");
      point(-1);
      draw();
    },
    colour(reading) {
      clusters = reading;
      colours = reading.data.map((_, place) => colourOf(place));
      draw();
    },
    clear() {
      [points, clusters] = [null, null];
      Object.assign(view, { x: 0, y: 0, zoom: 1 });
      thumbnails.clear();
      byId("map-say").textContent = "";
      byId("map-card").hidden = true;
      near = -1;
      draw();
    },
  };
}

function listen(canvas, { zoom, move, scale, point, nearest, open }) {
  const held = new Map(); // pointers that are down: id -> event
  let moved = 0;
  const spread = () => {
    const [one, other] = [...held.values()];
    return Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (!held.size) moved = 0;
    held.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) {
      point(nearest(event));
      return;
    }
    const spreadBefore = held.size === 2 ? spread() : 0;
    held.set(event.pointerId, event);
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
    moved += Math.abs(dx) + Math.abs(dy);
    if (moved < 5) return;
    if (held.size === 2) zoom(spread() / spreadBefore, event);
    else move(-dx / scale(), -dy / scale());
  });
  canvas.addEventListener("pointerup", (event) => {
    held.delete(event.pointerId);
    if (moved >= 5) return;
    const index = nearest(event);
    // A mouse has seen the picture before it clicks; a finger sees it first, and then taps the picture.
    if (event.pointerType === "mouse" && index >= 0) open(index);
    else point(index);
  });
  canvas.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
  canvas.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && !held.size) point(-1);
  });
  canvas.addEventListener("wheel", (event) => {
    // Without Ctrl a wheel scrolls the page; a trackpad's pinch comes with it.
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 200), event);
  }, { passive: false });
  const step = () => 60 / scale();
  const keys = {
    "+": () => zoom(1.6),
    "=": () => zoom(1.6),
    "-": () => zoom(1 / 1.6),
    ArrowLeft: () => move(-step(), 0),
    ArrowRight: () => move(step(), 0),
    ArrowUp: () => move(0, -step()),
    ArrowDown: () => move(0, step()),
  };
  canvas.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
}
