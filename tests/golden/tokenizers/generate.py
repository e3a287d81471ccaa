#!/usr/bin/env python3
"""Generates the small tokenizers of this folder and the ids HF gives for them.

Needs: Python 3.11, `pip install tokenizers==0.23.3`.
Run: `python3 generate.py` in this folder; it overwrites `*.json`. All but
`wordpiece` and `unigram` come out the same every time; HF trains those two in
the order of a seeded hash map.

Each tokenizer is trained on the sentences below, with 2,000 tokens at most,
but has the normalizer, pre-tokenizer, model flags and style of added tokens of
a real family, because those are where exactness is lost:

    llama3, qwen3, gptoss, deepseek3, gpt2   byte-level BPE
    gemma3                                   SentencePiece-style BPE, byte fallback
    glued                                    the same, with tokens across words
    wordpiece, unigram                       what the compiler has to refuse

`texts.json` holds the texts, `<name>.ids.json` the ids of each of them,
without special tokens. All text here is written for this file or made by a
seeded generator.
"""

import json
import random

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + TAIL
QWEN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + TAIL
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + TAIL
)
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]

SENTENCES = [
    "The worker that already holds the prefix in its cache answers first, because nothing has to be computed again.",
    "When the queue grows, the router weighs what is warm against what is busy; neither alone is enough.",
    "It's 12,345 requests; we'll see, they've said, that I'd be wrong and you're right. DON'T SHOUT, IT'S LATE.",
    "A gateway should never lose a request, whatever happens to the process beside it.",
    "Der Zähler wird genau einmal freigegeben, auch wenn die Verbindung plötzlich abreißt; das prüft ein Test.",
    "Größere Blöcke sparen Verwaltung, kleinere treffen häufiger. Übung macht den Meister.",
    "Le cache est chaud lorsque les premiers blocs de l'invite s'y trouvent déjà ; sinon il faut tout recalculer.",
    "Où est-ce qu'on a perdu la requête ? Peut-être à l'entrée, peut-être après le dernier nœud.",
    "El servidor más cercano no siempre es el más rápido: también cuenta lo que ya tiene en memoria.",
    "A memória é limitada, então os blocos mais antigos saem primeiro; não há outra solução.",
    "Il percorso della richiesta passa attraverso il filtro prima di arrivare al motore.",
    "Маршрутизатор выбирает того, у кого начало запроса уже посчитано, и записывает своё решение.",
    "Если очередь растёт, тёплый кэш уже не помогает: нужно считать и то, и другое.",
    "Черга зростає, і їжак поволі несе ґудзик додому.",
    "路由器会选择缓存中已经有提示词前缀的那一台机器，这样就不必重新计算。",
    "如果队列太长，那么即使缓存是热的，也应当换一台机器；两者都要考虑。今天天气很好，我们一起去公园吧！",
    "請求永遠不應該遺失，無論旁邊的程序發生了什麼事。",
    "ルーターは、プロンプトの先頭をすでに計算したワーカーを選びます。カタカナとひらがなと漢字が混ざっています。",
    "待ち行列が長いときは、温かいキャッシュだけでは足りません。",
    "라우터는 프롬프트의 앞부분을 이미 계산해 둔 워커를 고릅니다. 대기열이 길면 다른 곳으로 보냅니다.",
    "يختار الموجّه العامل الذي حسب بداية الطلب من قبل، ثم يسجّل قراره في السجل.",
    "הנתב בוחר את העובד שכבר חישב את תחילת הבקשה.",
    "राउटर उस वर्कर को चुनता है जिसने अनुरोध की शुरुआत पहले ही गणना कर ली है।",
    "เราเตอร์เลือกเครื่องที่คำนวณส่วนต้นของคำขอไว้แล้ว จึงไม่ต้องคำนวณใหม่",
    "Bộ định tuyến chọn máy đã tính sẵn phần đầu của yêu cầu; nếu hàng đợi dài thì đổi máy khác.",
    "Yönlendirici, isteğin başını zaten hesaplamış olan işçiyi seçer; kuyruk uzunsa başkasına gider.",
    "Router wybiera tego pracownika, który już policzył początek żądania. Zażółć gęślą jaźń.",
    "Ο δρομολογητής επιλέγει τον εργάτη που έχει ήδη υπολογίσει την αρχή του αιτήματος.",
    "def route(request, workers):\n    best = None\n    for worker in workers:\n        overlap = worker.overlap(request.blocks)\n        if best is None or overlap > best[0]:\n            best = (overlap, worker)\n    return best[1]\n",
    "fn choose(costs: &[f64]) -> Option<usize> {\n    let mut best = None;\n    for (index, cost) in costs.iter().enumerate() {\n        if best.is_none_or(|(_, least)| *cost < least) {\n            best = Some((index, *cost));\n        }\n    }\n    best.map(|(index, _)| index)\n}\n",
    '{"model": "small", "messages": [{"role": "user", "content": "hello\\nworld"}], "stream": true, "max_tokens": 256}\n',
    "SELECT worker_id, COUNT(*) AS blocks FROM held WHERE rank >= 0 GROUP BY worker_id ORDER BY blocks DESC LIMIT 10;\n",
    "#include <stdint.h>\nstatic inline uint64_t mix(uint64_t x) { x ^= x >> 33; x *= 0xff51afd7ed558ccdULL; return x ^ (x >> 33); }\n",
    "<html>\n\t<body class=\"wide\">\n\t\t<p>One &amp; two</p>\n\t</body>\n</html>\n",
    "| name | unit |\n| --- | --- |\n| `load_ms` | ms |\n\n- first\n- second\n  - nested\n\n1. one\n2. two\n",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org 192.0.2.17 2001:db8::1 2026-11-22T10:09:08.765Z",
    "😀😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷🇯🇵 ☕️ ✈️ 1️⃣ ∑∫√ ≤≥ → ← ★☆ № § ¶ † ‰ € £ ¥ ₿",
]

EDGES = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", " \n \n ", "a", " a", "a ", "  a", "a  ", "a  b", "a   b",
    "a\n\nb", "a \n b", "a\t\tb", "\u00a0a\u00a0\u00a0b", "\u3000全\u3000\u3000角", "\u2003\u2009x\u2028y\u2029z\u0085w",
    "1", "12", "123", "1234", "12345678", "1 2 3", "3.14159", "١٢٣٤٥", "１２３４", "Ⅷ½²", "x1y22z333", " 123", "  123", "\n123",
    "I'm you're he'll we'd they've it's don't", "I'M YOU'RE HE'LL WE'D THEY'VE IT'S DON'T", "'s 't 're ' ''s", "x'ſ y'Re'VE", "'K 'k",
    "camelCaseWord HTTPServer XMLHttpRequest iOS McDonald ÉCOLE éCole ǅungla", "a/b/c//d\n//e", "...!!!???\n\n", " ...\n", "-----\n=====\n",
    "e\u0301 e\u0323\u0301 a\u030a \u1100\u1161\u11a8 \u0915\u093c \u2126 \u212b \ufb01 \u1e9b\u0323", "\u0301start", "q\u0307\u0323", "\u1dfa\u0301 \U00011938",
    "\u0344 \u0958 \u2adc \u0f73 \U0001d15e", "▁", "▁a", "a▁b", "a ▁ b", "▁▁▁", "> ▁", ">▁>", "<0x41> <0xE2><0x96><0x81>", "Ġ Ċ ĉ âĢ",
    "\x00", "a\x00b", "\x01\x02\x7f", "\u200b\u200d\ufeff", "\ufffd", "\U0010ffff\ue000", "𝒜𝔅ℂ 𠮷野家 𐐷", "ﷺ", "ا" * 40, "漢" * 60, "ab" * 90, " " * 70,
    "\n" * 50, "=" * 100, "a" * 200, "é" * 100, "0" * 50, "_" * 33 + "x", "\t" * 31 + "y",
    " \u0301a", "a\u200dб", "日本語English混在テキスト123です。", "你好，world！", "한국어와English", "…—–“”‘’«»", "C++ C# F# .NET Node.js", "カ・カ゠か", "漢\u3040\u3097\u0378", "\u3040\u3097\u0378 か\u3099\u3098", "\u309b\u309cか、か。カーヽ", "\u0378\u0379\u3098漢", "\ue000\u3098\ue001", "\\n \\t \\\\ \"", "$x = @y ?? [];",
]

MARKS = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"],
    "gptoss": ["<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|endofprompt|>"],
    "deepseek3": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>", "<｜fim▁hole｜>", "<think>"],
    "gpt2": ["<|endoftext|>"],
    "gemma3": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "<unused0>", "<unused01>", "<td>"],
    "glued": ["<pad>", "<eos>", "<bos>", "<unk>"],
    "wordpiece": ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"],
    "unigram": ["<unk>", "<s>", "</s>"],
}


def fuzz_texts():
    rng = random.Random(20261122)
    kinds = [
        lambda: chr(rng.randint(32, 126)),
        lambda: chr(rng.randint(97, 122)),
        lambda: rng.choice(" \n\t\r\u00a0\u3000"),
        lambda: " ",
        lambda: chr(rng.randint(0x4E00, 0x9FFF)),
        lambda: chr(rng.randint(0xA0, 0x24FF)),
        lambda: chr(rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])),
        lambda: rng.choice(["'s", "'LL", " 123", "▁", "e\u0301", "\u0301", "\u0323", "...", "\r\n"]),
        lambda: chr(rng.randint(0x1F300, 0x1FAFF)),
        lambda: chr(rng.randint(0x3040, 0x30FF)),
    ]
    texts = []
    for _ in range(500):
        chosen = rng.sample(kinds, rng.randint(1, 4))
        texts.append("".join(rng.choice(chosen)() for _ in range(rng.randint(1, 40))))
    marks = sorted({mark for marks in MARKS.values() for mark in marks})
    for _ in range(250):
        parts = []
        for _ in range(rng.randint(1, 8)):
            mark = rng.choice(marks)
            cut = rng.randint(1, len(mark))
            parts.append(rng.choice([mark, mark, mark[:cut], mark[-cut:], " ", "\n", "word", "词", "e\u0301"]))
        texts.append("".join(parts))
    return texts


def corpus():
    """What the tokenizers are trained on: the sentences, whole and shuffled."""
    rng = random.Random(7)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    mixed = [" ".join(rng.choices(words, k=12)) for _ in range(2000)]
    return SENTENCES * 20 + mixed


def added(name):
    """Added tokens in the style of the family: (content, special, normalized)."""
    normal = {"deepseek3": {"<｜tool▁sep｜>", "<｜fim▁hole｜>", "<think>"}}.get(name, set())
    plain = {"qwen3": {"<tool_call>", "</tool_call>", "<think>", "</think>"}, "gemma3": set(MARKS["gemma3"][6:])}
    return [
        AddedToken(mark, special=mark not in plain.get(name, set()) and mark not in normal, normalized=mark in normal)
        for mark in MARKS[name]
    ]


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(name, patterns, normalizer=None, ignore_merges=False, trim=True):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim, use_regex=not patterns)
    parts = [split(pattern) for pattern in patterns] + [last]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if patterns else last
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = MARKS[name][:3] if name == "deepseek3" else []
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(added(name))
    return tokenizer


def sentence_piece(name):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if name == "gemma3":
        # For training only: words begin with a low line.
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        lines = corpus()
    else:
        lines = [text[at : at + 24] for text in corpus() for at in range(0, len(text), 24)]
    specials = MARKS[name] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False, special_tokens=specials, limit_alphabet=600)
    tokenizer.train_from_iterator(lines, trainer)
    # What the files of the family say, and that matches nothing.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if not token["content"].startswith("<0x")]
    for token in made["added_tokens"]:
        token["special"] = token["content"] in MARKS["gemma3"][:6]
    return Tokenizer.from_str(json.dumps(made))


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=1500, show_progress=False, special_tokens=MARKS["wordpiece"])
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, show_progress=False, special_tokens=MARKS["unigram"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def main():
    texts = SENTENCES + EDGES + fuzz_texts()
    with open("texts.json", "w", encoding="utf-8") as out:
        out.write("[\n" + ",\n".join(json.dumps(text) for text in texts) + "\n]\n")
    made = {
        "llama3": byte_level("llama3", [LLAMA3], ignore_merges=True),
        "qwen3": byte_level("qwen3", [QWEN], normalizer=normalizers.NFC(), trim=False),
        "gptoss": byte_level("gptoss", [O200K], ignore_merges=True),
        "deepseek3": byte_level("deepseek3", DEEPSEEK, normalizer=normalizers.Sequence([])),
        "gpt2": byte_level("gpt2", []),
        "gemma3": sentence_piece("gemma3"),
        "glued": sentence_piece("glued"),
        "wordpiece": wordpiece(),
        "unigram": unigram(),
    }
    for name, tokenizer in made.items():
        with open(f"{name}.json", "w", encoding="utf-8") as out:
            made = json.loads(tokenizer.to_str())
            if name in ("llama3", "deepseek3"):
                # Files of these families write a merge as one string.
                made["model"]["merges"] = [" ".join(merge) for merge in made["model"]["merges"]]
            json.dump(made, out, ensure_ascii=False, separators=(",", ":"))
        # The file decides, as for everybody else who reads it.
        tokenizer = Tokenizer.from_file(f"{name}.json")
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        with open(f"{name}.ids.json", "w", encoding="utf-8") as out:
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in ids)
            out.write("[\n" + rows + "\n]\n")
        print(name, "tokens", tokenizer.get_vocab_size(), "ids", sum(map(len, ids)))


main()
