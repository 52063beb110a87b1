// A canvas with a chip for each instance: masks are painted on a photo, boxes are dragged on a square.
// A click on the photo asks the server's function `click` for a mask.
// Its value: {picture, names, fixed, masks, boxes}; pictures are data URLs, boxes [x0, y0, x1, y1] in [0, 1].
const painting = props.mode === 'paint', colours = props.palette;
const make = (tag, traits, ...inside) => {
  const made = Object.assign(document.createElement(tag), traits);
  made.append(...inside);
  return made;
};
const canvas = make('canvas', {width: 640, height: painting ? 400 : 640});
const chips = make('div', {className: 'chips'}), tools = make('div', {className: 'tools'});
const told = make('div', {className: 'told'});
const context = canvas.getContext('2d');
let state = {picture: null, names: [], fixed: 0, masks: [], boxes: []};
let photo = null, layers = [], current = 0, tool = 'brush', size = 28, before = [], drag = null, stamp = null;
let clicks = [], asking = false;  // clicks of each instance: [x, y, 1 on it or 0 beside it]

const colour = (i) => colours[i % colours.length];
const layer = () => make('canvas', {width: canvas.width, height: canvas.height});
const pen = (of) => of.getContext('2d', {willReadFrequently: true});
const point = (event) => {
  const edge = canvas.getBoundingClientRect();
  return [(event.clientX - edge.left) / edge.width, (event.clientY - edge.top) / edge.height]
    .map((share) => Math.min(1, Math.max(0, share)));
};
const loaded = (url) => new Promise((done) => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = () => done(null);
  image.src = url;
});

function publish() {
  stamp = Math.random();
  props.value = {...state, stamp};
}

function draw() {
  const {width, height} = canvas;
  canvas.style.width = `min(100%, calc(66vh * ${width / height}))`;
  context.clearRect(0, 0, width, height);
  if (photo) context.drawImage(photo, 0, 0, width, height);
  else if (painting) hint('Drop a photo on the right to begin');
  else grid();
  layers.forEach((mask, i) => {
    const tinted = layer(), own = tinted.getContext('2d');
    own.drawImage(mask, 0, 0);
    own.globalCompositeOperation = 'source-in';
    own.fillStyle = colour(i);
    own.fillRect(0, 0, width, height);
    context.globalAlpha = i === current ? 0.65 : 0.45;
    context.drawImage(tinted, 0, 0);
    context.globalAlpha = 1;
  });
  if (!painting) state.boxes.forEach(drawBox);
  for (const [x, y, on] of clicks[current] || [])
    dot(x * width, y * height, on ? colour(current) : '#18181b', 'white', width / 90);
  if (drag && drag.outline) {
    context.strokeStyle = colour(current);
    context.lineWidth = 3;
    trace(context, drag.outline);
    context.stroke();
  }
}

function hint(text) {
  context.fillStyle = '#62626c';
  context.font = '18px system-ui, sans-serif';
  context.textAlign = 'center';
  context.fillText(text, canvas.width / 2, canvas.height / 2);
}

function grid() {
  context.strokeStyle = '#e2e2e6';
  context.lineWidth = 1;
  for (let i = 1; i < 8; i++) {
    const place = Math.round(canvas.width * i / 8) + 0.5;
    context.beginPath();
    context.moveTo(place, 0); context.lineTo(place, canvas.height);
    context.moveTo(0, place); context.lineTo(canvas.width, place);
    context.stroke();
  }
  if (!state.names.length) hint('Choose what was learned to place it here');
}

function drawBox(box, i) {
  if (!box) return;
  const [x0, y0, x1, y1] = box.map((share, k) => share * (k % 2 ? canvas.height : canvas.width));
  context.fillStyle = colour(i) + (i === current ? '40' : '22');
  context.fillRect(x0, y0, x1 - x0, y1 - y0);
  context.strokeStyle = colour(i);
  context.lineWidth = i === current ? 4 : 2.5;
  context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  context.font = '600 17px system-ui, sans-serif';
  context.textAlign = 'left';
  const text = state.names[i], wide = context.measureText(text).width + 16;
  context.fillStyle = colour(i);
  context.fillRect(x0, y0, wide, 27);
  context.fillStyle = props.inks[i % props.inks.length];
  context.fillText(text, x0 + 8, y0 + 19);
  if (i === current) {
    for (const [x, y] of [[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) dot(x, y, 'white', colour(i), 6);
  }
}

function dot(x, y, inside, rim, radius) {
  context.fillStyle = inside;
  context.strokeStyle = rim;
  context.lineWidth = radius / 3;
  context.beginPath(); context.arc(x, y, radius, 0, 7); context.fill(); context.stroke();
}

function trace(where, points) {
  where.beginPath();
  points.forEach(([x, y]) => where.lineTo(x * canvas.width, y * canvas.height));
}

function add(name = '') {
  state.names.push(name); state.masks.push(null); state.boxes.push(null); clicks.push([]);
  if (painting) layers.push(layer());
  current = state.names.length - 1;
}

function remove(i) {
  if (i < state.fixed) state.boxes[i] = null;
  else for (const list of [state.names, state.masks, state.boxes, layers, clicks]) list.splice(i, 1);
  current = Math.max(0, Math.min(current, state.names.length - 1));
  before = [];
  changed();
}

function changed() { publish(); show(); draw(); }

function show() {
  chips.replaceChildren(...state.names.map((name, i) => {
    const fixed = i < state.fixed;
    const label = fixed ? make('span', {textContent: name}) : make('input', {
      value: name, placeholder: painting ? 'what is it? car' : 'words of the prompt', size: 14,
      ariaLabel: `name ${i + 1}`,
      oninput: (event) => { state.names[i] = event.target.value; publish(); draw(); },
      onfocus: () => { current = i; mark(); draw(); },
    });
    const away = make('button', {
      textContent: '✕', title: fixed ? 'take its box away' : 'remove', onclick: (event) => { event.stopPropagation(); remove(i); },
    });
    const chip = make('div', {className: 'chip', onclick: () => { current = i; mark(); draw(); }},
      make('i'), label, away);
    chip.style.setProperty('--own', colour(i));
    return chip;
  }));
  if (photo || state.fixed) chips.append(make('button', {
    className: 'more', textContent: painting ? '+ instance' : '+ other words',
    onclick: () => { add(); changed(); chips.querySelectorAll('input')[chips.querySelectorAll('input').length - 1].focus(); },
  }));
  mark();
}

function mark() {
  chips.querySelectorAll('.chip').forEach((chip, i) => chip.classList.toggle('chosen', i === current));
  tools.querySelectorAll('button[data-tool]').forEach((each) => each.classList.toggle('chosen', each.dataset.tool === tool));
}

function build() {
  if (painting) {
    const about = {brush: 'paint over the instance', outline: 'draw around the instance; the inside is filled', eraser: 'take paint away',
      click: 'click on the instance; Segment Anything 2 finds its mask', 'click beside': 'click on what does not belong to it'};
    for (const name of Object.keys(about)) {
      const button = make('button', {textContent: name, title: about[name], onclick: () => { tool = name; mark(); }});
      button.dataset.tool = name;
      tools.append(button);
    }
    tools.append(make('input', {type: 'range', min: 4, max: 120, value: size, title: 'size of the brush', ariaLabel: 'size of the brush',
      oninput: (event) => { size = +event.target.value; }}));
    tools.append(make('button', {textContent: 'undo', onclick: undo}));
  }
  element.querySelector('.studio-canvas').replaceChildren(chips, tools, told, canvas);
}

function remember(i) {
  before.push([i, pen(layers[i]).getImageData(0, 0, canvas.width, canvas.height), clicks[i]]);
  if (before.length > 20) before.shift();
}

function undo() {
  const last = before.pop();
  if (!last) return;
  current = last[0];
  pen(layers[current]).putImageData(last[1], 0, 0);
  clicks[current] = last[2];
  exported(current);
  changed();
}

function fill(i, mask) {  // black is empty
  const own = pen(layers[i]);
  own.globalCompositeOperation = 'copy';
  own.drawImage(mask, 0, 0, canvas.width, canvas.height);
  const pixels = own.getImageData(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < pixels.data.length; k += 4) pixels.data[k + 3] = pixels.data[k];
  own.putImageData(pixels, 0, 0);
  exported(i);
}

async function ask(points) {
  if (asking) return;
  const own = layers[current];
  asking = true;
  told.textContent = 'Looking at the photo … the first click takes longest.';
  const failed = (error) => ({told: String(error)});
  const found = await server.click({picture: state.picture, points}).catch(failed);
  const mask = found.mask && await loaded(found.mask), i = layers.indexOf(own);
  asking = false;
  told.textContent = found.told || '';
  if (!mask || i < 0) return;  // nothing was found, or the instance is gone
  remember(i);
  fill(i, mask);
  clicks[i] = points;
  changed();
}

function stroke(from, to) {
  const own = pen(layers[current]);
  own.globalCompositeOperation = tool === 'eraser' ? 'destination-out' : 'source-over';
  own.strokeStyle = 'white';
  own.lineCap = 'round';
  own.lineWidth = size * canvas.width / 640;
  trace(own, [from, to]);
  own.stroke();
}

function exported(i) {  // white on black, without soft edges
  const flat = layer(), own = flat.getContext('2d');
  const pixels = pen(layers[i]).getImageData(0, 0, flat.width, flat.height);
  let any = false;
  for (let k = 0; k < pixels.data.length; k += 4) {
    const lit = pixels.data[k + 3] > 127;
    any ||= lit;
    pixels.data.fill(lit ? 255 : 0, k, k + 3);
    pixels.data[k + 3] = 255;
  }
  own.putImageData(pixels, 0, 0);
  state.masks[i] = any ? flat.toDataURL('image/png') : null;
}

function grip([x, y]) {  // what of which box lies under the pointer; the chosen box first
  const order = [current, ...state.boxes.keys()];
  for (const i of order) {
    const box = state.boxes[i];
    if (!box) continue;
    const near = (a, b) => Math.abs(a - b) < 0.025;
    for (const [h, v] of [[0, 1], [2, 1], [0, 3], [2, 3]])
      if (near(x, box[h]) && near(y, box[v])) return {i, fixed: [box[2 - h], box[4 - v]]};
    if (x > box[0] && x < box[2] && y > box[1] && y < box[3]) return {i, from: [x, y], box: [...box]};
  }
  return {i: current, fixed: [x, y]};
}

canvas.onpointerdown = (event) => {
  if (!state.names.length) return;
  canvas.setPointerCapture(event.pointerId);
  const here = point(event);
  if (!painting) {
    drag = grip(here);
    current = drag.i;
    mark();
  } else if (tool.startsWith('click')) ask([...clicks[current], [...here, tool === 'click' ? 1 : 0]]);
  else {
    remember(current);
    drag = {last: here, outline: tool === 'outline' ? [here] : null};
    if (!drag.outline) stroke(here, here);
  }
  draw();
};
canvas.onpointermove = (event) => {
  if (!drag) return;
  const here = point(event);
  if (!painting && drag.fixed) {
    const [a, b] = drag.fixed, [x, y] = here;
    state.boxes[drag.i] = [Math.min(a, x), Math.min(b, y), Math.max(a, x), Math.max(b, y)];
  } else if (!painting) {
    const [x0, y0, x1, y1] = drag.box;
    const dx = Math.min(1 - x1, Math.max(-x0, here[0] - drag.from[0]));
    const dy = Math.min(1 - y1, Math.max(-y0, here[1] - drag.from[1]));
    state.boxes[drag.i] = [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
  } else if (drag.outline) drag.outline.push(here);
  else { stroke(drag.last, here); drag.last = here; }
  draw();
};
canvas.onpointerup = canvas.onpointercancel = () => {
  if (!drag) return;
  if (painting && drag.outline) {
    const own = pen(layers[current]);
    own.globalCompositeOperation = 'source-over';
    own.fillStyle = 'white';
    trace(own, drag.outline);
    own.fill();
  }
  if (painting) exported(current);
  else {
    const box = state.boxes[drag.i];
    if (box) state.boxes[drag.i] = box[2] - box[0] < 0.02 || box[3] - box[1] < 0.02 ? null : box.map((share) => +share.toFixed(3));
  }
  drag = null;
  changed();
};

async function load(value) {
  const [shown, ...masks] = await Promise.all([value.picture, ...(value.masks || [])].map((url) => url ? loaded(url) : null));
  photo = shown;
  if (photo) { canvas.width = photo.width; canvas.height = photo.height; }
  state = {picture: value.picture || null, names: [], fixed: value.fixed || 0, masks: [], boxes: []};
  layers = []; before = []; clicks = [];
  told.textContent = '';
  (value.names || []).forEach((name, i) => {
    add(name);
    state.boxes[i] = (value.boxes || [])[i] || null;
    if (painting && masks[i]) fill(i, masks[i]);
  });
  if (painting && photo && !state.names.length) add();
  current = 0;
  changed();
}

build();
load(props.value || {});
watch('value', () => {
  if (!element.contains(canvas)) build();
  if (props.value && props.value.stamp !== stamp) load(props.value);
});
