// Pages opened from a folder may start no worker. This one runs the search's script in a hidden frame instead.
if (location.protocol === "file:") {
  // by this name the search knows that it is in a frame
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const element = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }));
      this.frame = element.contentWindow;
      this.frame.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) }));
      this.frame.importScripts = async (...scripts) => { for (const script of scripts) await this.load(script); };
      this.ready = this.load(url);
    }
    load(src) {
      const inside = this.frame.document;
      return new Promise(onload => inside.body.appendChild(Object.assign(inside.createElement("script"), { src, onload })));
    }
    async postMessage(data) {
      await this.ready;
      this.frame.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) }));
    }
    terminate() {
      this.frame.frameElement.remove();
    }
  };
}
