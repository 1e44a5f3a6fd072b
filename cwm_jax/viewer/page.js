"use strict";
const $ = id => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const state = document.body.dataset;
const brokenOff = "The answer broke off: is cwm-jax view still running in its terminal?";
const HEAT = [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 190]];
let clip, now = 0, points = [], chosen = null, story = null, picked = -1, playing = null, pending = 0, aim = null, queue = [], following = 0;
const frames = new Map();

// --- talking to the server: one address each, always with this session's token ---
async function get(path, query, signal) {
  const answer = await fetch(path + "?" + new URLSearchParams(query || {}), { headers: { "X-Token": token }, signal }).catch(error => {
    throw error.name === "AbortError" ? error : new Error("No answer: is cwm-jax view still running in its terminal?");
  });
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer;
}
async function* lines(path, query, signal) {
  const reader = (await get(path, query, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}
const busy = change => { pending += change; state.pending = pending; document.body.classList.toggle("waiting", pending > 0); };
const picture = async url => createImageBitmap(await (await get(...url)).blob());
function image(url) {
  const made = new Image();
  made.src = url;
  return made.decode().then(() => made);
}
function complain(error) {
  if (error.name === "AbortError") return;
  $("hint").textContent = error.message;
  $("hint").className = "error";
}

// --- the video, its points and tails ---
function frame(t) {
  if (!frames.has(t)) {
    if (frames.size > 120) frames.delete(frames.keys().next().value);
    const asked = picture(["frame", { t }]);
    frames.set(t, asked);
    // The next who wants it asks again.
    asked.catch(error => { if (frames.get(t) === asked) frames.delete(t); complain(error); });
  }
  return frames.get(t);
}
const colour = i => i === 0 ? "#40dcff" : `hsl(${(i * 222.5 + 40) % 360} 95% 65%)`;
function dot(pen, [x, y], r, fill, seen) {
  pen.lineWidth = r * 0.5;
  for (const [grown, style] of [[r * 0.3, "#0b0c10"], [0, fill]]) {
    pen.beginPath();
    pen.arc(x, y, r + grown, 0, 7);
    if (seen) { pen.fillStyle = style; pen.fill(); } else { pen.strokeStyle = style; pen.lineWidth = r * 0.45 + grown * 2; pen.stroke(); }
  }
}
function cross(pen, [x, y], r, colour = "#fff") {
  for (const [style, width] of [["#0b0c10", 4], [colour, 1.6]]) {
    pen.strokeStyle = style; pen.lineWidth = width; pen.beginPath();
    pen.moveTo(x - r, y); pen.lineTo(x + r, y); pen.moveTo(x, y - r); pen.lineTo(x, y + r); pen.stroke();
  }
}
async function draw() {
  const t = now, shown = await frame(t).catch(() => null);
  if (!shown || t !== now) return;
  const canvas = $("video"), k = Math.max(1, 900 / Math.max(shown.width, shown.height));
  if (canvas.width !== Math.round(shown.width * k)) { canvas.width = Math.round(shown.width * k); canvas.height = Math.round(shown.height * k); }
  const pen = canvas.getContext("2d"), s = canvas.width / clip.width, r = Math.max(6, canvas.width / 95);
  pen.drawImage(shown, 0, 0, canvas.width, canvas.height);
  const place = xy => [xy[0] * s, xy[1] * s];
  for (const point of points) {
    const step = t < point.t ? -1 : 1;
    pen.lineCap = "round";
    // The tail, from the newest backwards; frames that are not answered yet are passed over.
    for (let i = 1, last = point.track[t]; i <= Math.min(14, Math.abs(t - point.t)); i++) {
      const a = point.track[t - step * i];
      if (a && last) {
        pen.strokeStyle = point.colour; pen.globalAlpha = 1 - i / 15; pen.lineWidth = r * 0.6;
        pen.beginPath(); pen.moveTo(...place(a.xy)); pen.lineTo(...place(last.xy)); pen.stroke();
      }
      last = a || last;
    }
    pen.globalAlpha = 1;
    const here = point.track[t], truth = point.truth && point.truth[t];
    if (here) dot(pen, place(here.xy), point === chosen ? r : r * 0.75, point.colour, here.visible);
    if (truth) cross(pen, place(truth), r * 1.7);
  }
  if (aim) cross(pen, place(aim), r * 4, "#40dcff");
  $("when").textContent = `frame ${clip.first + t}` + (chosen && t === chosen.t ? ", clicked" : "");
  $("scrub").value = t;
  ribbon();
}
function ribbon() {
  const canvas = $("ribbon"), pen = canvas.getContext("2d");
  const w = canvas.width = canvas.clientWidth * devicePixelRatio, h = canvas.height = canvas.clientHeight * devicePixelRatio;
  const step = w / clip.frames, bar = Math.max(1, step * 0.72);
  const top = chosen ? Math.max(0.1, ...chosen.track.filter((a, t) => a && t !== chosen.t).map(a => a.confidence)) : 1;
  for (let t = 0; t < clip.frames; t++) {
    const a = chosen && chosen.track[t], x = t * step + (step - bar) / 2;
    const high = a ? Math.max(3, Math.min(1, a.confidence / top) * (h - 10)) : 2;
    pen.strokeStyle = pen.fillStyle = a ? chosen.colour : "#3a404c";
    if (!a || a.visible) pen.fillRect(x, h - 4 - high, bar, high);
    else { pen.lineWidth = devicePixelRatio; pen.strokeRect(x + 0.5, h - 4 - high, Math.max(1, bar - 1), high); }
  }
  pen.fillStyle = "#fff";
  pen.fillRect((now + 0.5) * step - devicePixelRatio, 0, 2 * devicePixelRatio, h);
}

// --- the story of one question ---
function cells(canvas, w, h) { canvas.width = w; canvas.height = h; return canvas.getContext("2d"); }
function heatPixels(heat, top, alpha) {
  const bytes = Uint8Array.from(atob(heat.values), c => c.charCodeAt(0)), out = new ImageData(heat.width, heat.height);
  for (let i = 0; i < bytes.length; i++) {
    const share = Math.min(1, bytes[i] / 255 * heat.top / Math.max(top, 1e-12)), at = share * (HEAT.length - 1);
    const low = Math.min(HEAT.length - 2, Math.floor(at));
    for (let c = 0; c < 3; c++) out.data[4 * i + c] = HEAT[low][c] + (HEAT[low + 1][c] - HEAT[low][c]) * (at - low);
    out.data[4 * i + 3] = alpha ? 255 * Math.sqrt(share) : 255;
  }
  return out;
}
async function overlay(heat, top) {
  const made = new OffscreenCanvas(heat.width, heat.height);
  made.getContext("2d").putImageData(heatPixels(heat, top, true), 0, 0);
  return made;
}
async function tell() {
  const it = story;
  if (!it || !it.masks.length) return;
  const top = Math.max(...it.masks.map(m => m.response.top)), mask = it.masks[picked] || it.masks.find(m => m.response.top === top);
  const strip = $("masks");
  while (strip.children.length > it.masks.length) strip.lastChild.remove();
  it.masks.forEach((m, i) => {
    if (!strip.children[i]) {
      const button = document.createElement("button");
      button.onclick = () => { picked = i; tell(); };
      button.append(document.createElement("canvas"));
      button.ariaLabel = button.title = `mask ${i + 1}`;
      strip.append(button);
    }
    const button = strip.children[i], canvas = button.firstChild;
    cells(canvas, m.response.width, m.response.height).putImageData(heatPixels(m.response, top), 0, 0);
    button.ariaPressed = m === mask;
  });
  const [marked, added, clean, counterfact, later] = await Promise.all([image(it.masks[0].marked), image(it.masks[0].mark), image(mask.clean), image(mask.counterfact), frame(it.t2)]);
  if (it !== story) return;
  const w = marked.width, h = marked.height, x = it.point.xy[0] / clip.width, y = it.point.xy[1] / clip.height;
  // The mark is small: a quarter of the frame round it.
  const fit = (at, side) => Math.max(0, Math.min(side - side / 2.5, at * side - side / 5));
  const pen = cells($("marked"), w * 4, h * 4);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(marked, fit(x, w), fit(y, h), w / 2.5, h / 2.5, 0, 0, w * 4, h * 4);
  pen.strokeStyle = it.point.colour; pen.lineWidth = w / 22; pen.beginPath();
  pen.arc((x * w - fit(x, w)) * 10, (y * h - fit(y, h)) * 10, w * 0.55, 0, 7); pen.stroke();
  const corner = y < 0.5 ? h * 2.6 : 0;
  pen.drawImage(added, fit(x, w), fit(y, h), w / 2.5, h / 2.5, 0, corner, w * 1.4, h * 1.4);
  pen.strokeStyle = "#111317"; pen.strokeRect(0, corner, w * 1.4, h * 1.4);
  const shown = cells($("shown"), w * 4, h * 4), rows = mask.hidden.length, columns = mask.hidden[0].length;
  shown.drawImage(later, 0, 0, w * 4, h * 4);
  shown.fillStyle = "#3d434f";
  mask.hidden.forEach((row, r) => [...row].forEach((bit, c) => {
    if (bit === "1") shown.fillRect(c * w * 4 / columns, r * h * 4 / rows, w * 4 / columns + 0.5, h * 4 / rows + 0.5);
  }));
  for (const [id, made] of [["clean", clean], ["counterfact", counterfact]]) cells($(id), w, h).drawImage(made, 0, 0);
  const last = it.masks[it.masks.length - 1], k = 720 / Math.max(clip.width, clip.height), mean = cells($("mean"), clip.width * k, clip.height * k);
  mean.filter = "grayscale(1) brightness(.55)";
  mean.drawImage(later, 0, 0, mean.canvas.width, mean.canvas.height);
  mean.filter = "none";
  mean.drawImage(await overlay(last.mean, last.mean.top), 0, 0, mean.canvas.width, mean.canvas.height);
  const from = it.point.xy.map(v => v * k), to = last.to_xy.map(v => v * k), truth = it.point.truth && it.point.truth[it.t2];
  mean.strokeStyle = it.point.colour; mean.lineWidth = 3;
  mean.beginPath(); mean.moveTo(...from); mean.lineTo(...to); mean.stroke();
  dot(mean, to, 9, it.point.colour, last.visible);
  if (truth) cross(mean, truth.map(v => v * k), 16);
  const moved = Math.hypot(last.to_xy[0] - it.point.xy[0], last.to_xy[1] - it.point.xy[1]);
  const error = truth ? `, ${Math.hypot(last.to_xy[0] - truth[0], last.to_xy[1] - truth[1]).toFixed(1)} px from the truth (cross)` : "";
  const many = it.masks.length, lead = document.createElement("b");
  lead.textContent = last.visible ? `It moved ${moved.toFixed(1)} px` : "Not seen here";
  const rest = last.visible ? `from frame ${clip.first + it.t1} to frame ${clip.first + it.t2}${error}. ` : "The prediction hardly answers the mark. ";
  $("said").replaceChildren(lead, rest + `${many} ${many === 1 ? "mask" : "masks"} so far`.replace(" so far", it.done ? "." : " so far"));
  $("said").className = "";
  $("said").ariaBusy = !it.done;
  state.masks = it.masks.length;
}
let explaining = null, wait = 0;
function explain() {
  clearTimeout(wait);
  if (!chosen) return;
  const last = clip.frames - 1, near = chosen.t + Math.max(1, Math.round(last / 3));
  const t2 = now !== chosen.t ? now : near <= last ? near : Math.max(0, chosen.t - Math.max(1, Math.round(last / 3)));
  if (story && story.point === chosen && story.t2 === t2) return;
  wait = setTimeout(async () => {
    if (explaining) explaining.abort();
    const stop = explaining = new AbortController(), it = story = { point: chosen, t1: chosen.t, t2, masks: [], done: false };
    for (const label of document.querySelectorAll(".later")) label.textContent = `frame ${clip.first + t2}`;
    const [x, y] = chosen.xy;
    busy(1);
    try {
      for await (const event of lines("explain", { t1: it.t1, t2, x, y }, stop.signal)) {
        if (it !== story) break;
        it.masks.push(event);
        await tell();
      }
      if (it === story && !it.masks.length) throw new Error(brokenOff);
      it.done = true;
      if (it === story) { await tell(); state.explained = `${it.t1}-${t2}`; }
    } catch (error) {
      if (it === story) { story = null; $("said").ariaBusy = false; }
      complain(error);
    } finally { busy(-1); }
  }, 90);
}

// --- what the person does ---
// A browser opens six connections to a host, and a track holds one until it ends: two at a time, and
// the chosen point's beside them, leave some for frames and explanations.
function follow(point) {
  if (point.stop) point.stop.abort();
  // What the server will say first: a point is seen, and can be chosen, while it waits for its turn.
  point.track = [];
  point.track[point.t] = { t: point.t, xy: point.xy, visible: true, confidence: 1 };
  draw();
  if (!queue.includes(point)) { queue.push(point); busy(1); }
  followNext();
}
function followNext() {
  while (queue.length && following < (queue.includes(chosen) ? 3 : 2)) {
    const [point] = queue.splice(Math.max(0, queue.indexOf(chosen)), 1);
    following += 1;
    ask(point).finally(() => { following -= 1; busy(-1); followNext(); });
  }
}
async function ask(point) {
  const stop = point.stop = new AbortController(), [x, y] = point.xy, begun = performance.now();
  try {
    for await (const event of lines("track", { t: point.t, x, y, mode: $("mode").value }, stop.signal)) {
      if (stop.signal.aborted) return;
      if (event.truth_xy) point.truth = event.truth_xy;
      else point.track[event.t] = event;
      if (point.track.filter(Boolean).length === clip.frames) state.tracked = point.number;
      draw();
    }
    // A server that leaves ends its answer as one that is done does.
    if (point.track.filter(Boolean).length < clip.frames) throw new Error(brokenOff);
    $("hint").className = "faint";
    $("hint").textContent = `Tracked through ${clip.frames} frames in ${((performance.now() - begun) / 1000).toFixed(1)} s. Scrub to ask about another frame; click for another point, on a dot to choose it again. Hollow: not seen.` + (point.truth ? " Cross: the truth." : "");
  } catch (error) { complain(error); }
}
// Chooses the point whose dot is there; where none is, or with Shift, makes a new one.
function mark(xy, always) {
  const reach = 1.2 * Math.max(clip.width, clip.height) / 95;
  const away = point => point.track[now] ? Math.hypot(point.track[now].xy[0] - xy[0], point.track[now].xy[1] - xy[1]) : Infinity;
  const near = points.reduce((best, point) => away(point) < (best ? away(best) : reach) ? point : best, null);
  chosen = !always && near || { t: now, xy, track: [], colour: colour(points.length), number: points.length + 1 };
  if (chosen !== near) { points.push(chosen); follow(chosen); } else followNext();
  $("save").disabled = $("clear").disabled = $("push").disabled = false;
  picked = -1;
  explain();
  draw();
}
$("video").onclick = event => {
  const box = $("video").getBoundingClientRect(), scale = Math.min(box.width / clip.width, box.height / clip.height);
  const x = (event.clientX - box.left - (box.width - clip.width * scale) / 2) / scale, y = (event.clientY - box.top - (box.height - clip.height * scale) / 2) / scale;
  if (x >= 0 && y >= 0 && x <= clip.width && y <= clip.height) mark([x, y], event.shiftKey);
};
// A click takes no focus, so that the arrows go on stepping through the frames.
$("video").onmousedown = event => { event.preventDefault(); document.activeElement.blur(); };
// Without a mouse: a cross-hair, moved by the arrows.
function aimAt(xy) {
  aim = xy && xy.map((v, i) => Math.max(0, Math.min([clip.width, clip.height][i], v)));
  $("aim").textContent = aim ? `x ${Math.round(aim[0])}, y ${Math.round(aim[1])}` : "";
  draw();
}
$("video").onblur = () => aim && aimAt(null);
$("video").onkeydown = event => {
  const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
  if (!clip || !way && event.key !== "Enter" || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  event.stopPropagation();
  if (!way && event.repeat) return;
  const from = aim || [clip.width / 2, clip.height / 2], pace = Math.max(1, Math.max(clip.width, clip.height) / 400) * (event.shiftKey ? 10 : 1);
  if (way) aimAt(aim ? from.map((v, i) => v + way[i] * pace) : from);
  else { aimAt(from); mark(aim, event.shiftKey); }
};
function seek(t) {
  now = Math.max(0, Math.min(clip.frames - 1, t));
  draw();
  if (!playing) explain();
}
function play() {
  $("play").textContent = playing ? "play" : "pause";
  if (playing) { clearInterval(playing); playing = null; explain(); return; }
  playing = setInterval(() => seek((now + 1) % clip.frames), 1000 / Math.min(30, clip.fps));
}
$("scrub").oninput = () => seek(+$("scrub").value);
$("ribbon").onclick = event => seek(Math.floor(event.offsetX / $("ribbon").clientWidth * clip.frames));
$("play").onclick = play;
$("push").onclick = async () => {
  const point = chosen, [x, y] = point.xy;
  busy(1);
  try {
    const { along } = await (await get("segment", { t: point.t, x, y })).json(), later = await frame(point.t);
    if (point !== chosen) return;
    const k = 720 / Math.max(clip.width, clip.height), mean = cells($("mean"), clip.width * k, clip.height * k);
    mean.filter = "grayscale(1) brightness(.55)";
    mean.drawImage(later, 0, 0, mean.canvas.width, mean.canvas.height);
    mean.filter = "none";
    mean.drawImage(await overlay(along, along.top * 0.6), 0, 0, mean.canvas.width, mean.canvas.height);
    dot(mean, [x * k, y * k], 9, point.colour, true);
    const lead = document.createElement("b");
    lead.textContent = "What moves along";
    $("said").ariaBusy = false;
    $("said").replaceChildren(lead, `The patch under the point was moved in a copy of frame ${clip.first + point.t}, and the rest predicted: bright pixels went with it. Scrub to see the track's story again.`);
    story = null;
    state.pushed = point.number;
  } catch (error) { complain(error); } finally { busy(-1); }
};
$("mode").onchange = () => points.forEach(follow);
$("clear").onclick = () => {
  points.forEach(point => point.stop && point.stop.abort());
  clearTimeout(wait);
  if (explaining) explaining.abort();
  $("said").ariaBusy = false;
  busy(-queue.length);
  points = []; queue = []; chosen = story = null;
  $("save").disabled = $("clear").disabled = $("push").disabled = true;
  draw();
};
$("save").onclick = () => {
  // A point on the right or lower edge is outside the frame for the command.
  const within = (v, size) => Math.min(v, size - 0.01).toFixed(2);
  const rows = points.map(p => [clip.first + p.t, within(p.xy[1], clip.height), within(p.xy[0], clip.width)].join());
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([["t,y,x", ...rows, ""].join("\n")], { type: "text/csv" }));
  link.download = "points.csv";
  link.click();
};
document.onkeydown = event => {
  if (event.target.tagName === "SELECT" || event.ctrlKey || event.altKey || event.metaKey) return;
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) { event.preventDefault(); seek(now + step); }
  if (event.key === " " && event.target.tagName !== "BUTTON") { event.preventDefault(); play(); }
};
onresize = () => clip && draw();
(async () => {
  try {
    clip = await (await get("clip")).json();
    document.title = $("name").textContent = clip.name;
    $("facts").textContent = `${clip.frames} frames of ${clip.width} × ${clip.height}` + (clip.first ? `, from frame ${clip.first} on` : "");
    $("scrub").max = clip.frames - 1;
    await draw();
    state.ready = "yes";
  } catch (error) { complain(error); }
})();
