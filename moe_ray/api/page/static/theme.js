// Light or dark: as the system has it, until the user chooses.

import { icon } from "./dom.js";

const CHOICE = "moe-ray.theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
export const calm = matchMedia("(prefers-reduced-motion: reduce)");

export function startTheme(button, changed) {
  const apply = () => {
    const theme = localStorage.getItem(CHOICE) ?? (dark.matches ? "dark" : "light");
    document.documentElement.dataset.theme = theme;
    const label = theme === "dark" ? "Light colours" : "Dark colours";
    button.setAttribute("aria-label", label);
    button.title = label;
    button.replaceChildren(icon(theme === "dark" ? "sun" : "moon"));
    changed();
  };
  button.addEventListener("click", () => {
    localStorage.setItem(CHOICE, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}
