"""A form over a Chat: what was said, a field to say more, and the adapter switched on or off.

The answer is given in a thread, so that it shows as it comes and can be stopped. Only widgets that ipywidgets 7.7
(Colab) and 8 share; no text here is read as markup.
"""

from __future__ import annotations

import threading

import ipywidgets
from IPython.display import display

from llamanb.chat import Chat
from llamanb.errors import LlamanbError
from llamanb.html import alert, join, paragraph


class ChatForm:
    """Widgets over a Chat; its turns so far are shown. `chat` may be used beside it: the next turn shows both."""

    def __init__(self, chat: Chat):
        self.chat = chat
        wide, narrow = ipywidgets.Layout(width="40em", max_width="95%"), ipywidgets.Layout(width="8em")
        self._said, self._answer, self._message = (ipywidgets.HTML() for _ in range(3))
        for part in (self._said, self._answer, self._message):
            part.add_class("jp-RenderedHTMLCommon")  # as tables look in any other output of JupyterLab
        self.turn = ipywidgets.Textarea(description="You", placeholder="say something, then Tab and Space", layout=wide)
        self.adapter = ipywidgets.Checkbox(chat.adapter and chat.has_adapter, description="Adapter", indent=False)
        self.adapter.disabled, self.adapter.layout = not chat.has_adapter, narrow
        self.send, self.stop, self.clear = (
            ipywidgets.Button(description=words, layout=narrow) for words in ("Send", "Stop", "Clear")
        )
        self.send.on_click(self._send)
        self.stop.on_click(lambda _: chat.stop())
        self.clear.on_click(self._clear)
        buttons = ipywidgets.HBox([self.send, self.stop, self.clear, self.adapter])
        self._box = ipywidgets.VBox([self._said, self._answer, self._message, self.turn, buttons])
        self._thread = threading.Thread(target=lambda: None)
        self._show(answering=False)

    def wait(self) -> None:
        """Until the answer that is being given has come to its end."""
        if self._thread.is_alive():
            self._thread.join()

    def _send(self, button) -> None:
        text, self._message.value = self.turn.value, ""
        self.chat.adapter = self.adapter.value
        self._show(answering=True)
        self._answer.value = paragraph(f"you: {text}")
        self._thread = threading.Thread(target=self._say, args=(text,), daemon=True)
        self._thread.start()

    def _say(self, text: str) -> None:
        def heard(answer: str) -> None:
            self._answer.value = paragraph(f"you: {text}") + paragraph(answer)

        try:
            self.chat.say(text, heard)
            self.turn.value = ""
            if self.chat.forgotten:
                self._message.value = paragraph(f"answered without the first {self.chat.forgotten} messages: no room")
        except LlamanbError as error:
            self._message.value = join(error)
        except Exception as error:  # a thread has nobody else to tell
            parts = {"why": error, "how to fix it": "Send tries again; what was said before is kept"}
            self._message.value = alert(type(error).__name__, "no answer came", parts)
        finally:
            self._show(answering=False)

    def _clear(self, button) -> None:
        self.chat.clear()
        self._message.value = ""
        self._show(answering=False)

    def _show(self, *, answering: bool) -> None:
        self._said.value = join(self.chat) if self.chat.messages else ""
        self._answer.value = ""
        self.send.disabled = self.clear.disabled = self.turn.disabled = answering
        self.stop.disabled = not answering

    def _ipython_display_(self) -> None:
        display(self._box)


def chat_form(chat: Chat) -> ChatForm:
    """A form to go on with a conversation by hand."""
    return ChatForm(chat)
