// SPDX-License-Identifier: Apache-2.0
// Search runs in a worker, and browsers start none for a page that was opened as a file. There a
// hidden frame takes its place. (MkDocs Material would fetch a script for this from the network.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      this.inside = frame.contentWindow
      // What the script posts comes out here.
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = this.inside.document.createElement("script")
      script.src = new URL(url, location.href)
      this.started = new Promise(resolve => script.addEventListener("load", resolve))
      this.inside.document.body.append(script)
    }

    async postMessage(data) {
      await this.started
      this.inside.dispatchEvent(new MessageEvent("message", { data }))
    }
  }
}
