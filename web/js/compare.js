// Shows FlashVideo Compare's two clips in the node, with a slider between them. Without this, or on a page that lacks
// what it needs, the node works all the same.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { CompareSlider } from "./compare_slider.js";
import { wordsOf } from "./compare_words.js";

const NODE = "FlashVideoCompare";
const KEY = "flashvideo_compare"; // as in nodes/native/slider.py
const LEAST = 150; // height of the slider, as in compare_style.js
const BAR = 30, MARGIN = 10, ROOM = 40; // height of the buttons; around the slider; above the title of the next node
const TALLEST = 1.25; // widths that an upright picture may be high, unless the user makes the node higher
let count = 0;
const sliders = new WeakMap(); // by node

/** The address of a result's file on the server. */
function urlOf({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type: type ?? "temp" })}`);
}

function language() {
  return app.extensionManager?.setting?.get?.("Comfy.Locale")
    ?? app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? navigator.language;
}

/** Scroll and zoom the graph, as anywhere beside the slider. */
function forwardWheel(event) {
  const canvas = app.canvas?.canvas;
  if (!canvas) return;
  event.preventDefault();
  event.stopPropagation();
  canvas.dispatchEvent(new WheelEvent("wheel", event));
}

/** What can be shown of a node's results. */
function shownOf(output) {
  const results = output?.[KEY];
  if (!Array.isArray(results)) return null;
  const isShown = ({ file, ...numbers } = {}) => typeof file?.filename === "string"
    && ["width", "height", "offset", "frames", "total", "fps"].every((name) => Number(numbers[name]) > 0);
  return results.filter((each) => each && isShown(each));
}

/** How high the slider should be below the node's other parts: the whole picture, if no other node is in its way. */
function roomFor(node, result, others) {
  const [left, top] = node.pos, [width, height] = node.size;
  const wanted = BAR + (width - 2 * MARGIN) * Math.min(result.height / result.width, TALLEST);
  const below = (node.graph?.nodes ?? [])
    .filter((other) => other !== node && other.pos[1] > top + height
      && other.pos[0] < left + width && other.pos[0] + other.size[0] > left)
    .map((other) => other.pos[1] - ROOM - top - others);
  return Math.max(LEAST, Math.min(wanted, ...below));
}

function sliderOf(node, result) {
  const slider = new CompareSlider({ urlOf, words: wordsOf(language()), onWheel: forwardWheel });
  slider.element.classList.add("widget-expands"); // fills a node of Nodes 2.0
  const options = { serialize: false, hideOnZoom: false, getMinHeight: () => LEAST };
  // A name of its own, or Nodes 2.0 goes on showing what a node of the same number had before an undo.
  const widget = node.addDOMWidget(`compare ${++count}`, NODE, slider.element, options);
  widget.serialize = false; // not among the values that a workflow saves
  sliders.set(node, slider);
  const [width, height] = node.computeSize(), others = height - LEAST;
  const room = roomFor(node, result, others);
  if (window.LiteGraph?.vueNodesMode) slider.element.style.minHeight = `${room}px`; // its nodes are as high as need be
  if (node.size[1] < height) node.setSize([Math.max(node.size[0], width), others + room]);
  return slider;
}

/** Show a node's results; `null` are those of a page or a server that has none. */
function show(node, results) {
  if (results === null || typeof node.addDOMWidget !== "function") return;
  let slider = sliders.get(node);
  if (!slider && results.length === 0) return;
  slider ??= sliderOf(node, results[0]);
  slider.show(results);
  app.graph?.setDirtyCanvas?.(true, true);
}

/** The nodes of the graph and of its subgraphs, each with the name under which the page keeps its results. */
function* named(graph) {
  for (const node of graph?.nodes ?? []) yield [String(node.id), node];
  for (const [id, subgraph] of graph?.subgraphs ?? []) {
    for (const node of subgraph.nodes ?? []) yield [`${id}:${node.id}`, node];
  }
}

/** Show what the page still knows of earlier runs: after an undo, or when a workflow's tab is opened again. */
function restore(outputs) {
  if (!outputs) return;
  for (const [name, node] of named(app.rootGraph ?? app.graph)) {
    if (node.comfyClass === NODE && outputs[name]) show(node, shownOf(outputs[name]));
  }
}

app.registerExtension({
  name: "FlashVideo.Compare",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const { onExecuted, onRemoved } = node;
    node.onExecuted = function (output, ...rest) {
      onExecuted?.call(this, output, ...rest);
      show(this, shownOf(output));
    };
    node.onRemoved = function (...all) {
      sliders.get(this)?.destroy();
      sliders.delete(this);
      onRemoved?.apply(this, all);
    };
  },
  onNodeOutputsUpdated: (outputs) => restore(outputs),
  afterConfigureGraph: () => restore(app.nodeOutputs),
});
