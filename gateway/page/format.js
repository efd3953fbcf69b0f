// Formatting of numbers.
import { locale, t } from "./words.js";

const UNITS = [[2 ** 30, "GiB", 2], [2 ** 20, "MiB", 0], [2 ** 10, "KiB", 0]];

export function size(bytes) {
  for (const [unit, name, digits] of UNITS) if (bytes >= unit) return `${(bytes / unit).toFixed(digits)} ${name}`;
  return `${Math.round(bytes)} B`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds)} ${t("second")}`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} ${t("minute")}`;
  return `${Math.floor(seconds / 3600)} ${t("hour")} ${Math.floor((seconds % 3600) / 60)} ${t("minute")}`;
}

export const count = (value) => value.toLocaleString(locale());

export const speed = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);
