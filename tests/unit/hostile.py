"""Hundreds of strings that would rather be something else than text, the same ones on every run."""

PWN = "window.pwned=1"
MARKUP = (
    f"<script>{PWN}</script>",
    f"<SCRIPT SRC=//evil.test/x.js></SCRIPT><script>{PWN}</script>",
    f"<scr<script>ipt>{PWN}</scr</script>ipt>",
    f"<img src=x onerror={PWN}>",
    f"<img src='https://evil.test/x.png' onload='{PWN}'>",
    f"<svg/onload={PWN}>",
    f"<svg><script>{PWN}</script></svg>",
    f"<math><mtext></mtext><style><img src onerror={PWN}></style></math>",
    f"<body onload={PWN}>",
    f"<iframe src='javascript:parent.{PWN}'></iframe>",
    f"<iframe srcdoc='<script>parent.{PWN}</script>'></iframe>",
    f"<object data='javascript:{PWN}'></object><embed src='https://evil.test/x.swf'>",
    f"<details open ontoggle={PWN}>",
    f"<input autofocus onfocus={PWN}>",
    f"<video><source onerror={PWN}></video>",
    f"<a href='javascript:{PWN}' autofocus onfocus={PWN}>click</a>",
    "<a href='command:workbench.action.terminal.new'>click</a>",
    f"<style>@import 'https://evil.test/x.css'</style><div style=\"background:url(javascript:{PWN})\">",
    "<link rel=stylesheet href=https://evil.test/x.css><meta http-equiv=refresh content='0;url=https://evil.test'>",
    "<base href=https://evil.test/><form action=https://evil.test><button>go</button></form>",
    f"<div hidden><template><script>{PWN}</script></template>",
    f"&lt;script&gt;{PWN}&lt;/script&gt;&#60;script&#62;{PWN}",
    f"' onmouseover='{PWN}' style='position:fixed;inset:0",
    f'" onmouseover="{PWN}" style="position:fixed;inset:0',
    f"` onmouseover=`{PWN}",
)
ENDINGS = (
    "",
    "'>",
    '">',
    "</td></tr></table>",
    "</script>",
    "</style></title></textarea></pre>",
    "-->",
    "]]>",
    "</div>\n",
)
MATH = tuple(
    left + inner + right
    for left, right in (
        *(("$", "$"), ("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]")),
        *((f"\\begin{{{name}}}", f"\\end{{{name}}}") for name in ("equation", "align*", "math")),
    )
    for inner in (
        f"\\href{{javascript:{PWN}}}{{x}}",
        "\\require{html}\\style{position:fixed}{x}",
        "x",
        "\\unicode{x}",
        "$",
    )
)
LINKS = tuple(
    shape.replace("{}", address)
    for address in (
        f"javascript:{PWN}",
        "command:workbench.action.terminal.sendSequence?%7B%22text%22%3A%22id%5Cn%22%7D",
        f"data:text/html,<script>{PWN}</script>",
        "https://evil.test/x",
        "vbscript:msgbox(1)",
        "//evil.test",
    )
    for shape in ("{}", "[x]({})", "![x]({})", "<{}>", "[x]: {}\n\n[x]", "`[x]({})`", "```\n[x]({})\n```\n# x\n[x]({})")
)
PATHS = (
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc/passwd",
        "~/.ssh/id_rsa",
        "..",
        ".",
    ),
    *(
        "..\\..\\windows\\win.ini",
        "C:\\Users",
        "\\\\evil.test\\share",
        "//evil.test/share",
        "/dev/zero",
        "/proc/self/environ",
    ),
    *(
        "a/../../b",
        "....//....//etc",
        "\N{FULLWIDTH FULL STOP}./x",
        "nul",
        "-rf",
        "|id",
        "$(id)",
        "`id`",
        "; id #",
        "a\x00.png",
    ),
)
TEMPLATES = (
    *(
        "{{7*7}}",
        "{% include '/etc/passwd' %}",
        "{0.__class__.__mro__}",
        "{what!r:>99999999}",
        "%s%n%(x)s",
        "${7*7}",
        "#{7*7}",
    ),
    *(
        "{",
        "}",
        "{}",
        "{{",
        "<%= 7*7 %>",
        "<?php ?>",
        "__import__('os')",
        "!!python/object:os.system",
        "---\nx: y\n---",
        "~~~",
    ),
)
TERMINAL = tuple(
    f"a{escape}b"
    for escape in (
        *(
            "\x1b[31m",
            "\x1b[2J\x1b[H",
            "\x1b]0;title\x07",
            "\x1b]8;;https://evil.test\x1b\\x\x1b]8;;\x1b\\",
            "\x1bP+q\x1b\\",
        ),
        *("\x9b31m", "\r", "\r\n", "\b\b", "\x07", "\x7f", "\x00", "\x0b", "\x0c", "\x1c", "\x85", "\v\f\x1a"),
    )
)
UNICODE = tuple(
    f"a{c}gnp.exe"
    for c in (
        *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\u2028\u2029\u2060\ufeff\ufffe\uffff\u00ad",
        *(
            "\ud800",
            "\udc80",
            "\udfff\ud800",
            "\U000e0041",
            "\U0001f469\u200d\U0001f52c",
            "e" + "\u0301" * 200,
            "\u00a0",
            "\u3000",
        ),
        *("\uff1cscript\uff1e", "\u2039script\u203a", "\ufe64img src\ufe65", "\u0130\u0131\u017f\u212a"),
    )
)
LONG = (*("a" * 5_000, "a b " * 1_000, "\n" * 500, "<b>" * 1_000, "$" * 500, "`" * 500, "[" * 1_000), "", " ", "\t")
STRINGS = [
    *(end + markup for end in ENDINGS for markup in MARKUP),
    *(*MATH, *LINKS, *PATHS, *TEMPLATES, *TERMINAL, *UNICODE, *LONG),
]

NAMES = ("../up", "..", "../../etc/passwd", "a/../../up", "/etc/passwd", "/tmp/x", "a\\..\\up", "..\\up", "C:\\up")
NAMES += (
    "C:up",
    "\\\\server\\share",
    "x\0y",
    "~root/x",
    ".",
    "./up",
    "a/b/c",
    "up\n",
    "-rf ..",
    "..%2fup",
    ".hidden/x",
)
"""Lead out of a folder, here or elsewhere, or are no names."""
