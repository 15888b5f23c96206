// Chinese and Japanese on pages that lose them. Frontends about 1.32 merge the packs' translations at the start, load the
// user's language after that, and its file replaces what was merged. This puts the pack's own texts back, before the
// nodes are named; a page that has them is left alone, and so is one whose inside looks different.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const OURS = "FlashVideo"; // part of the id of every node of the pack
const CORE = "KSampler"; // a node whose texts come with the page's own file of a language
const PATIENCE = 5000, PAUSE = 50; // milliseconds

/** The page's texts, as its translation library holds them. */
function texts() {
  const page = document.querySelector("#vue-app")?.__vue_app__;
  return page?._context?.provides?.[page.__VUE_I18N_SYMBOL__]?.global;
}

function language() {
  return app.extensionManager?.setting?.get?.("Comfy.Locale");
}

/** Whether a language's own file is there; it takes a moment after the setting is known. */
async function loaded(messages, locale) {
  for (const end = Date.now() + PATIENCE; Date.now() < end;) {
    if (messages.getLocaleMessage(locale)?.nodeDefs?.[CORE] && messages.locale.value === locale) return true;
    await new Promise((resolve) => setTimeout(resolve, PAUSE));
  }
  return false;
}

/** Put the pack's texts into the user's language; returns whether they were missing. */
async function mend() {
  const messages = texts(), locale = language();
  if (!messages?.mergeLocaleMessage || !locale || locale === "en" || !(await loaded(messages, locale))) return false;
  const present = messages.getLocaleMessage(locale).nodeDefs;
  if (Object.keys(present).some((id) => id.includes(OURS))) return false;
  const all = await (await api.fetchApi("/i18n")).json();
  const nodeDefs = Object.entries(all[locale]?.nodeDefs ?? {}).filter(([id]) => id.includes(OURS));
  if (!nodeDefs.length) return false;
  messages.mergeLocaleMessage(locale, { nodeDefs: Object.fromEntries(nodeDefs) });
  return true;
}

async function quietly(task) {
  try {
    return await task();
  } catch (error) {
    console.debug("FlashVideo: the page keeps its English node texts.", error);
    return false;
  }
}

app.registerExtension({
  name: "FlashVideo.Translations",
  // The page waits for this before it names the nodes.
  init: () => quietly(mend),
  setup() {
    app.ui?.settings?.addEventListener?.("Comfy.Locale.change", () => quietly(async () => {
      if (await mend()) await app.extensionManager.command.execute("Comfy.RefreshNodeDefinitions");
    }));
  },
});
