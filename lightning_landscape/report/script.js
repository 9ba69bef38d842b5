"use strict";
for (const film of document.querySelectorAll(".film")) {
  const large = film.querySelector(".large");
  const slider = film.querySelector("input");
  const output = film.querySelector("output");
  const buttons = [...film.querySelectorAll(".strip button")];
  const show = (index) => {
    const step = buttons[index].querySelector("span").textContent;
    large.src = buttons[index].querySelector("img").src;
    large.alt = film.dataset.kind + " at step " + step;
    output.textContent = step;
    slider.value = index;
    slider.setAttribute("aria-valuetext", "step " + step);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
    film.dispatchEvent(new CustomEvent("step", { detail: Number(step) })); // to surface.js
  };
  buttons.forEach((button, index) => button.addEventListener("click", () => show(index)));
  slider.addEventListener("input", () => show(Number(slider.value)));
  slider.disabled = buttons.length < 2;
  show(buttons.length - 1);
}
