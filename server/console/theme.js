// The theme: auto (the system's), light or dark; the choice is remembered.

const THEMES = ["auto", "light", "dark"];

export function themeToggle(button) {
  let theme = localStorage.getItem("theme");
  const show = () => {
    if (!THEMES.includes(theme)) theme = "auto";
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("theme", theme);
    show();
  });
  show();
}
