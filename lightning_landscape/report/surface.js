"use strict";
// Draws planes as surfaces that can be turned. Points are [right, away, up]: the first two are from
// -1 to 1 and turn, up is from 0 to 1. Quadrilaterals are painted from the back to the front.
for (const view of document.querySelectorAll(".surface")) {
  const data = JSON.parse(view.querySelector("script").textContent);
  const canvas = view.querySelector("canvas"), pen = canvas.getContext("2d");
  const MARGIN = 44; // at the left of the box, in pixels
  let turn = -0.6, tilt = 0.8; // radians; at tilt 0 the box is seen from the side
  let frame, faces, project, from; // from: where the pointer was

  // The quadrilaterals of a frame, without those that have a corner without a loss.
  const facesOf = ({ x, y, heights }) => {
    const face = (row, column) => {
      const places = [[row, column], [row, column + 1], [row + 1, column + 1], [row + 1, column]];
      const corners = places.map(([r, c]) => [x[c], y[r], heights[r][c]]);
      if (corners.some((corner) => corner[2] === null)) return [];
      const middle = [0, 1, 2].map((i) => corners.reduce((sum, p) => sum + p[i], 0) / 4);
      return [{ corners, middle, colors: colorsOf(corners, middle[2]) }];
    };
    return y.slice(1).flatMap((_, row) => x.slice(1).flatMap((_, column) => face(row, column)));
  };

  // The colour of the loss, darker where the surface is turned away from a lamp; that of the edge.
  const colorsOf = ([a, b, c, d], height) => {
    const right = (b[2] + c[2] - a[2] - d[2]) / (b[0] - a[0]) / 2; // slopes
    const away = (d[2] + c[2] - a[2] - b[2]) / (d[1] - a[1]) / 2;
    const light = Math.max(0, 0.6 * right + 0.4 * away + 0.7) / Math.hypot(right, away, 1);
    const color = data.colors[Math.round(height * (data.colors.length - 1))];
    const shares = [0.65 + 0.35 * light, 0.5 + 0.25 * light];
    return shares.map((share) => `rgb(${color.map((part) => share * part)})`);
  };

  // A function from points to pixels and depth, so that the box fills the canvas.
  const projection = (width, height) => {
    const [sin, cos, up, flat] = [Math.sin(turn), Math.cos(turn), Math.sin(tilt), Math.cos(tilt)];
    const scale = Math.min((width - 1.5 * MARGIN) / Math.SQRT2 / 2,
      (height - 1.6 * MARGIN) / (2 * (Math.abs(sin) + Math.abs(cos)) * up + flat));
    return ([x, y, z]) => {
      const right = x * cos - y * sin, away = x * sin + y * cos, high = z - 0.5;
      return [width / 2 + MARGIN / 4 + scale * right,
        height / 2 - MARGIN / 4 - scale * (high * flat + away * up), away * flat - high * up];
    };
  };

  const line = (points) => {
    pen.beginPath();
    for (const point of points) pen.lineTo(...project(point).slice(0, 2));
    pen.stroke();
  };
  const drawFace = ({ corners, colors: [fillStyle, strokeStyle] }) => {
    Object.assign(pen, { fillStyle, strokeStyle, lineWidth: 0.7 });
    line([...corners, corners[0]]);
    pen.fill();
  };
  const drawWeights = () => {
    Object.assign(pen, { fillStyle: "#ffffff", strokeStyle: "#1a1a1a", lineWidth: 2 });
    pen.beginPath();
    pen.arc(...project(frame.weights).slice(0, 2), 4, 0, 7);
    pen.stroke();
    pen.fill();
  };

  // The floor, and both rear walls with lines at the ticks.
  const drawBox = (x, y) => {
    const walls = [[x, -y], [x, y], [-x, y]];
    pen.globalAlpha = 0.4;
    for (const [, z] of [...data.ticks, ["", 0], ["", 1]]) line(walls.map((p) => [...p, z]));
    for (const p of walls) line([[...p, 0], [...p, 1]]);
    line([[x, -y, 0], [-x, -y, 0], [-x, y, 0]]);
    pen.globalAlpha = 1;
  };

  // Text beside a point of the box, inside the canvas.
  const write = (text, point, right, down) => {
    const [x, y] = project(point), length = pen.measureText(text).width;
    const start = Math.min(x + right - (right < 0 ? length : 0), canvas.clientWidth - length - 2);
    pen.strokeText(text, Math.max(2, start), y + down);
    pen.fillText(text, Math.max(2, start), y + down);
  };

  const drawTexts = (x, y) => {
    const left = x === y ? [-x, y] : [x, -y]; // the corner at the left
    let last = project([...left, 1])[1] - 9;
    write(data.loss, [...left, 1], -6, -9);
    for (const [text, z] of [...data.ticks].reverse()) {
      const at = project([...left, z])[1];
      if (at - last < 13) continue; // no room
      write(text, [...left, z], -6, 0);
      last = at;
    }
    [(at) => [at, -y, 0], (at) => [-x, at, 0]].forEach((edge, axis) => {
      const side = project(edge(0))[0] < project([0, 0, 0])[0] ? -1 : 1; // of the box
      write(frame.names[axis], edge(0), 12 * side, 26);
      frame.ends[axis].forEach((end, i) => write(end, edge(1.8 * i - 0.9), 4 * side, 10));
    });
  };

  const draw = () => {
    const width = canvas.clientWidth, height = canvas.clientHeight, dots = window.devicePixelRatio;
    Object.assign(canvas, { width: width * dots, height: height * dots });
    pen.scale(dots, dots);
    const { color, backgroundColor, fontFamily } = getComputedStyle(canvas);
    Object.assign(pen, { fillStyle: backgroundColor, strokeStyle: color, lineJoin: "round" });
    pen.fillRect(0, 0, width, height); // a page in dark colours can be printed on white paper
    project = projection(width, height);
    const rear = [Math.sin(turn) < 0 ? -1 : 1, Math.cos(turn) < 0 ? -1 : 1];
    drawBox(...rear);
    const parts = faces.map((face) => [project(face.middle)[2], () => drawFace(face)]);
    if (frame.weights) parts.push([project(frame.weights)[2] - 0.15, drawWeights]); // on the faces
    parts.sort((a, b) => b[0] - a[0]).forEach(([, paint]) => paint());
    pen.globalAlpha = 0.6; // visible through the surface
    if (frame.weights) drawWeights();
    Object.assign(pen, { globalAlpha: 1, font: `12px ${fontFamily}`, textBaseline: "middle" });
    Object.assign(pen, { fillStyle: color, strokeStyle: backgroundColor, lineWidth: 3 });
    drawTexts(...rear);
  };
  const rotate = (right, down) => {
    turn += right;
    tilt = Math.max(0.1, Math.min(tilt + down, 1.2));
    draw();
  };
  const keys = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // the page does not scroll
    rotate(...keys[event.key].map((way) => 0.12 * way));
  });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    from = event;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    rotate((event.clientX - from.clientX) / 120, (event.clientY - from.clientY) / 120);
    from = event;
  });
  // script.js tells which step the flat picture shows.
  view.closest(".film").addEventListener("step", ({ detail: step }) => {
    const far = (one) => Math.abs(one.step - step);
    [frame] = [...data.frames].sort((one, other) => far(one) - far(other));
    faces = facesOf(frame);
    view.querySelector("span").textContent = frame.text;
    canvas.setAttribute("aria-label", "Surface. " + frame.text);
    view.hidden = false;
    draw();
  });
  new ResizeObserver(() => frame && draw()).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
