"""The commands of docs/kubernetes.md, which `tunnel` runs on the rig's hosts: what a person reads there is what was tried.

A block says on its first line where it runs: ```sh cloud, ```sh node (each edge), ```sh build (by `run`); with a further
word for blocks that are no plain commands: `runs` for a program that goes on running, others by name.
"""

import re

from lab import check

BLOCK = re.compile(r"^```(?:sh|text) ?([\w -]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORDS = {("build",), ("cloud",), ("cloud", "runs"), ("cloud", "tries"), ("cloud", "unix"), ("cloud", "urls"),
         ("cloud", "gateways"), ("cloud", "agents"), ("haproxy",), ("kube-apiserver",), ("node",), ("node", "runs")}


class Guide:
    """The document's blocks, in its order."""

    def __init__(self, document):
        self.blocks = [(tuple(words.split()), text) for words, text in BLOCK.findall(document)]
        check({words for words, _ in self.blocks} == WORDS,
              f"the guide has blocks that nobody runs, or lacks some: {[words for words, _ in self.blocks]}")

    def text(self, *words):
        """The only block of these words."""
        texts = [text for named, text in self.blocks if named == words]
        check(len(texts) == 1, f"the guide has {len(texts)} blocks for {' '.join(words)}, not one")
        return texts[0]
