"""Renders chats with the Python jinja2 the way transformers does: test/golden/tokenizer/chats.json.

Run from the repository root: python3 test/oracle/chat-template.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
Needs jinja2 (3.1.6 made the committed file). Then run test/oracle/tokenize.ts, which adds llama.cpp's token ids.
"""

import json
import pathlib
import struct
import sys

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHATS = [
    [("user", "What is the capital of France?")],
    [
        ("system", "You are terse."),
        ("user", "  leading and trailing space  "),
        ("assistant", "Yes.\n"),
        ("user", "Why?\n\n```js\nlet a = 1;\n```"),
    ],
    [("user", "你好 😀"), ("assistant", ""), ("user", "1234 it's < | > <| |> im_start <im_end> im_end|>")],
    [("system", "")],
    [("assistant", "first"), ("system", "late"), ("user", "\t<")],
    [("user", ">\r\n|> x <|im_")],
    [],
]


def read_template(path):
    data = pathlib.Path(path).read_bytes()
    key = b"tokenizer.chat_template"
    at = data.index(key) + len(key) + 4  # key, value type, then the string's length
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode()


def main():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(read_template(sys.argv[1]))
    chats = []
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        prompt = template.render(messages=messages, add_generation_prompt=True)
        chats.append({"messages": messages, "prompt": prompt})
    golden = {"madeBy": f"jinja2 {jinja2.__version__}, test/oracle/chat-template.py", "chats": chats}
    target = pathlib.Path(__file__).parent / "../golden/tokenizer/chats.json"
    target.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


main()
