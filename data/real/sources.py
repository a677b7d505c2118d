"""
Where public data sets and GPT-2's weights are fetched from, under which licence, and what for.

A checksum stands here only where it was taken from a copy at hand or from a public page or project
that states it; the others are None and are recorded on the first download (see downloads.py).
Sizes are in bytes, as published; a round number is about. URLs are pinned to a revision wherever
one is known. The addresses come from public pages and projects that use them; none was fetched
when this table was written.

Where a set's home offers parquet alone (SST-2, RTE, WSC, CNN/DailyMail), the address is that of an
older release in plain text or JSON.
"""

from dataclasses import dataclass

HUB = "https://huggingface.co"
GITHUB = "https://raw.githubusercontent.com"
OPENAI = "https://openaipublic.blob.core.windows.net"
GLUE = "https://dl.fbaipublicfiles.com/glue"


@dataclass(frozen=True)
class RemoteFile:
    """One file: where it is, its name under the source's folder, and what is known of it."""

    url: str
    path: str
    size: int | None = None
    sha256: str | None = None
    unpack: tuple[tuple[str, str], ...] = ()  # (member of the archive, name under the folder)


@dataclass(frozen=True)
class Source:
    """A set of files that is fetched by one name; `becomes` says what for."""

    files: tuple[RemoteFile, ...]
    licence: str
    becomes: str
    # local files under other names that serve as well: a regular expression, searched in paths
    stand_in: str | None = None
    needs: tuple[str, ...] = ()  # other sources that are fetched with it


def _gpt2(name: str, about: int, sha256: str, revision: str = "main") -> Source:
    base = f"{HUB}/openai-community/{name}/resolve/{revision}"
    return Source(
        (
            RemoteFile(f"{base}/config.json", "config.json", 700),
            RemoteFile(f"{base}/model.safetensors", "model.safetensors", about, sha256),
        ),
        "MIT (modified)",
        f"weights: --init {name}",
        needs=("gpt2-bpe",),
    )


def _hh_rlhf() -> Source:
    base = f"{HUB}/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
    known = {
        "harmless-base/train": (
            13_200_000,
            "bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217",
        ),
        "harmless-base/test": (
            742_801,
            "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
        ),
        "helpful-base/test": (
            875_191,
            "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
        ),
        "helpful-base/train": (
            16_200_131,
            "518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4",
        ),
        "helpful-online/train": (20_100_000, None),
        "helpful-online/test": (1_050_000, None),
        "helpful-rejection-sampled/train": (25_700_000, None),
        "helpful-rejection-sampled/test": (1_360_000, None),
    }
    names = [
        f"{subset}/{split}"
        for subset in (
            "harmless-base",
            "helpful-base",
            "helpful-online",
            "helpful-rejection-sampled",
        )
        for split in ("train", "test")
    ]
    return Source(
        tuple(
            RemoteFile(
                f"{base}/{name}.jsonl.gz", f"{name}.jsonl.gz", *known.get(name, (None, None))
            )
            for name in names
        ),
        "MIT",
        "comparisons, K = 2: prepare hh-rlhf",
    )


def _summarize() -> Source:
    base = f"{OPENAI}/summarize-from-feedback/dataset/comparisons"
    return Source(
        tuple(
            RemoteFile(f"{base}/batch{n}.json", f"comparisons/batch{n}.json") for n in range(3, 11)
        ),
        "modified MIT; posts CC BY 4.0",
        "comparisons, K = 2, on which Stiennon et al. trained: prepare summarize",
    )


# The novels of github.com/computationalstylistics/100_english_novels whose authors died before
# 1937: Author_Title_Year, bytes, SHA-256.
NOVELS = """
Burnett_Garden_1911 432340 873fb069535018036a4695afedf7403e7ae64a2830794067eca6044d4b054bc9
Burnett_Lord_1886 314584 516484062347814d52f2c5d2a815fdcc5634d34bcb0e364415de48d224104720
Burnett_Princess_1905 364852 913e08ca45ae2943ee99589e2c0699bd35f05792ee41da58359baec01df207b0
Cbronte_Jane_1847 1024721 b90cf982eab5d5f07da1ab9fdd6890e46817d4186511dac74564917a19cb8b1b
Chesterton_Innocence_1911 449155 30c64a3e06d61346fa8791a1626f92617e42c4485c975370459ae76508607cfe
Chesterton_Thursday_1908 327721 52e3da061f0e8d8bfcf38ed7ac6f6567704c8a7f14be6dc4113b674cbafb7570
Conrad_Nostromo_1904 981289 27fd2592a0c96f964e9a174711d48e3de6a53ee0844a4d8bfff31929fc6932d7
Dickens_Expectations_1861 1007557 ab621543c4746eaa3261cc4effddf6d13bb27504ae9da0aa226c961c62464396
Dickens_Oliver_1839 905078 7e468c526c2616648f1940b47d769c657487eb48b25223c0f3feb018de484a1c
Doyle_Hound_1902 321773 af0c16569cb5aee4e984b1a3fc8cd0754cdfe301f1b830d28601a50f1e777104
Doyle_Lost_1912 427079 2aedeacb117d75644cd9f636f0420922b2f7b24fe8756ea56d4f5a5512bb629d
Eliot_Adam_1859 1172112 da2f921e496a96f514c1d116fa38a5c85462e43e5a38878e97c7a852bd3306e6
Gaskell_Wives_1865 1473366 2e6c0858f4176cdd37cf3036d80257440248f05b8d21360b8f3766dde6d7213a
Haggard_Mines_1885 453272 96162f8c51b25587769b13a7a0a663f9a35dd2b7e4a2f0c508b735c178589d18
Haggard_She_1887 622573 293011ffc26255b3c579c0201fcc1b7b9de08d9a8301d049039d6ddfffae85b3
Hardy_Madding_1874 777360 1118f019071e003741e41d17808846b35052fccb6ec9ae68eb54e013cbc7466c
Hardy_Tess_1891 852473 875016489be7a27249370c209b4716037febb83b6cb4432f982d13047624fc4f
James_Ambassadors_1903 921783 df21b75f546ede152847cb01028bf104b7c5074b736825fd498c53b29994fba4
Kipling_Captains_1896 298696 4cbd826a3d084f020286923cf70773d0627ccf494521be54d84dbe967c3b509f
Kipling_Kim_1901 586886 a54d7aa479b7961abc407a03b5d7f56107f0ee72692930f107ab3e3ac5d94a0b
Morris_Wood_1894 260944 75ecab0623a9ab7e268d1d7ba31f04fe9c1c31b97357177485b0b953bcf64712
Schreiner_Farm_1883 538145 72ceb45280959797286c98af0e7bf385e0cb23fee7582808c0b4ebbb4f8b58b0
Stevenson_Arrow_1888 437369 f754f350e3c5856263566e7a39db63927e1b7c764b30e1c50f4e7f6fb2b68150
Stevenson_Treasure_1883 361439 e55cdea0f8c4224415ed711c59bb4a3c83e23a8d8a209956ea13ce2351899814
Thackeray_Esmond_1852 1024614 1ee2aefb01bba143ab26222bbba76288fca205d98f539ecaa795c4b672f77450
Trollope_Warden_1855 398712 7ea03f128eb005afd26e01db31a921b33fe932ebb4826016297ffac5e2a75632
Wcollins_Woman_1860 1358624 67a1a391d54ec5c10b7291f5717af7bb3eb37c3acfd2a3a8662a088360e71170
"""


def _novels() -> Source:
    base = (
        f"{GITHUB}/computationalstylistics/100_english_novels/"
        "143e601875d70e195f2cc5ebd8b034609271194d/corpus"
    )
    files = []
    for line in NOVELS.split("\n")[1:-1]:
        name, size, sha256 = line.split()
        files.append(
            RemoteFile(f"{base}/{name}.txt", f"english_novels/{name}.txt", int(size), sha256)
        )
    return Source(tuple(files), "public domain", "documents to pretrain on: prepare novels")


def _wikitext() -> Source:
    base = (
        f"{GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
        "word_language_model/data/wikitext-2"
    )
    known = {
        "valid": (1_121_681, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8"),
        "test": (1_256_449, "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0"),
    }
    return Source(
        tuple(
            RemoteFile(
                f"{base}/{split}.txt", f"wikitext-2/{split}.txt", *known.get(split, (None, None))
            )
            for split in ("train", "valid", "test")
        ),
        "CC BY-SA 3.0",
        "documents to pretrain on: prepare wikitext",
    )


SOURCES: dict[str, Source] = {
    "gpt2": _gpt2(
        "gpt2",
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    ),
    "gpt2-medium": _gpt2(
        "gpt2-medium",
        1_520_000_000,
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    ),
    "gpt2-large": _gpt2(
        "gpt2-large",
        3_250_000_000,
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    ),
    "gpt2-xl": _gpt2(
        "gpt2-xl", 6_430_000_000, "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a"
    ),
    "gpt2-bpe": Source(
        (
            RemoteFile(
                f"{OPENAI}/gpt-2/encodings/main/vocab.bpe",
                "vocab.bpe",
                456_318,
                "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            ),
            RemoteFile(
                f"{OPENAI}/gpt-2/encodings/main/encoder.json",
                "encoder.json",
                1_042_301,
                "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            ),
        ),
        "MIT (modified)",
        "the tokenizer of every set that is prepared",
    ),
    # demonstrations, prompts, comparisons, documents
    "hh-rlhf": _hh_rlhf(),
    "oasst": Source(
        (
            RemoteFile(
                f"{HUB}/datasets/OpenAssistant/oasst1/resolve/fdf72ae0827c1cda404aff25b6603abec9e3399b/"
                "2023-04-12_oasst_ready.trees.jsonl.gz",
                "2023-04-12_oasst_ready.trees.jsonl.gz",
                34_145_252,
                "2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7",
            ),
        ),
        "Apache-2.0",
        "comparisons, K = 2..9: prepare oasst",
    ),
    "qa-feedback": Source(
        tuple(
            RemoteFile(
                f"{GITHUB}/allenai/FineGrainedRLHF/a1469d4eba0b3754bcb343beb88f0aca24bf4848/tasks/"
                f"qa_feedback/data/{split}_feedback.json",
                f"{split}_feedback.json",
            )
            for split in ("train", "dev")
        ),
        "Apache-2.0",
        "comparisons, K = 4: prepare qa-feedback",
    ),
    "summarize": _summarize(),
    "tldr": Source(
        tuple(
            RemoteFile(
                f"{OPENAI}/summarize-from-feedback/datasets/tldr_3_filtered/{split}.jsonl",
                f"tldr_3_filtered/{split}.jsonl",
            )
            for split in ("train", "valid", "test")
        ),
        "CC BY 4.0",
        "demonstrations: prepare tldr; test.jsonl is the evaluation's TL;DR task",
    ),
    "alpaca": Source(
        (
            RemoteFile(
                f"{GITHUB}/tatsu-lab/stanford_alpaca/main/alpaca_data.json", "alpaca_data.json"
            ),
        ),
        "CC BY-NC 4.0",
        "demonstrations: prepare alpaca",
    ),
    "dolly": Source(
        (
            RemoteFile(
                f"{HUB}/datasets/databricks/databricks-dolly-15k/resolve/"
                "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
                "databricks-dolly-15k.jsonl",
                13_085_339,
                "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
            ),
        ),
        "CC BY-SA 3.0",
        "demonstrations: prepare dolly",
    ),
    "lottery": Source(
        (
            RemoteFile(
                f"{GITHUB}/LAION-AI/Open-Assistant/f1e6ed9526f5817531f3ab85441a40b3671ddccb/model/"
                "model_eval/manual/data/prompt_lottery_en_250_text.jsonl",
                "prompt_lottery_en_250_text.jsonl",
                29_026,
                "c5c706385a8166d308920e6a2e53b4ffa340d6dda5027cf57e2c39533f4d52f3",
            ),
        ),
        "Apache-2.0",
        "prompts: prepare lottery",
    ),
    "novels": _novels(),
    "shakespeare": Source(
        (
            RemoteFile(
                f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                "tinyshakespeare/input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
        "public domain",
        "documents to pretrain on: prepare shakespeare",
    ),
    "wikitext": _wikitext(),
    # evaluation
    "truthfulqa": Source(
        (
            RemoteFile(f"{GITHUB}/sylinrl/TruthfulQA/main/TruthfulQA.csv", "TruthfulQA.csv"),
            RemoteFile(f"{GITHUB}/sylinrl/TruthfulQA/main/data/mc_task.json", "mc_task.json"),
        ),
        "Apache-2.0",
        "evaluation: truthfulness",
    ),
    "realtoxicityprompts": Source(
        (
            RemoteFile(
                "https://ai2-public-datasets.s3.amazonaws.com/realtoxicityprompts/"
                "realtoxicityprompts-data.tar.gz",
                "realtoxicityprompts-data.tar.gz",
                unpack=(("realtoxicityprompts-data/prompts.jsonl", "prompts.jsonl"),),
            ),
        ),
        "Apache-2.0",
        "evaluation: toxicity",
        r"realtoxicityprompts/[^/]+\.jsonl$",
    ),
    "toxicity-labels": Source(
        (
            RemoteFile(
                f"{GITHUB}/t-davidson/hate-speech-and-offensive-language/"
                "cb50f7e9eb855a99abc51423bf40df0e26d6fe30/data/labeled_data.csv",
                "labeled_data.csv",
                2_546_446,
                "fcb8bc7c68120ae4af04a5b9acd58585513ede11e1548ebf36a5c2040b6f6281",
            ),
        ),
        "MIT",
        "evaluation: tweets that the toxicity scorer is trained on",
    ),
    "winogender": Source(
        tuple(
            RemoteFile(
                f"{GITHUB}/rudinger/winogender-schemas/master/data/{name}.tsv",
                f"{name}.tsv",
                size,
                sha256,
            )
            for name, size, sha256 in (
                (
                    "all_sentences",
                    83_644,
                    "bd69da16bf228cb8df63fd0843aec2d8b5c36a7f21bf8c7b168bcc83932556c8",
                ),
                (
                    "templates",
                    14_903,
                    "496f2e2dc77296bcebcdd8865a8dc5715ce22b772de9abb5f531d5b3114c48a0",
                ),
                (
                    "occupations-stats",
                    1_578,
                    "3f7f37c16381a70571356982ea7fe613ac700ad04a6d3b19b9f2be18248df567",
                ),
            )
        ),
        "MIT",
        "evaluation: bias",
    ),
    "crows-pairs": Source(
        (
            RemoteFile(
                f"{GITHUB}/nyu-mll/crows-pairs/8aaac11c485473159ec9328a65253a5be9a479dc/data/"
                "crows_pairs_anonymized.csv",
                "crows_pairs_anonymized.csv",
                437_764,
                "dfb36986ce0502abbaf7055b9176da3d08d48e07df1251991b5dfbcbceab9d0c",
            ),
        ),
        "CC BY-SA 4.0",
        "evaluation: bias",
    ),
    "hellaswag": Source(
        (
            RemoteFile(
                f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
                "hellaswag_val.jsonl",
                12_246_618,
                "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
            ),
        ),
        "MIT",
        "evaluation: alignment tax",
        r"hellaswag_val[^/]*\.jsonl$",
    ),
    "lambada": Source(
        (
            RemoteFile(
                f"{OPENAI}/gpt-2/data/lambada_test.jsonl",
                "lambada_test.jsonl",
                1_819_752,
                "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
            ),
        ),
        "CC BY 4.0",
        "evaluation: alignment tax",
    ),
    "sst2": Source(
        (
            RemoteFile(
                f"{GLUE}/data/SST-2.zip",
                "SST-2.zip",
                7_439_277,
                "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa",
                (("SST-2/dev.tsv", "dev.tsv"),),
            ),
        ),
        "none stated",
        "evaluation: alignment tax",
        r"(?:^|/)sst-?2[^/]*\.(?:jsonl|tsv)$",
    ),
    "rte": Source(
        (
            RemoteFile(
                f"{GLUE}/data/RTE.zip",
                "RTE.zip",
                697_150,
                "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee",
                (("RTE/dev.tsv", "dev.tsv"),),
            ),
        ),
        "none stated",
        "evaluation: alignment tax",
        r"(?:^|/)rte[^/]*\.(?:jsonl|tsv)$",
    ),
    "wsc": Source(
        (
            RemoteFile(
                f"{GLUE}/superglue/data/v2/WSC.zip",
                "WSC.zip",
                32_751,
                "2ed6dfa94556b4a128ff0441efe365b2e883124e7e6aa00fb8d3a6cb1fd520a9",
                (("WSC/val.jsonl", "val.jsonl"),),
            ),
        ),
        "none stated",
        "evaluation: alignment tax",
    ),
    "squad2": Source(
        (
            RemoteFile(
                "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
                "dev-v2.0.json",
                4_370_528,
                "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
            ),
        ),
        "CC BY-SA 4.0",
        "evaluation: alignment tax",
    ),
    "drop": Source(
        (
            RemoteFile(
                "https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/drop_dataset.zip",
                "drop_dataset.zip",
                8_308_692,
                "39d2278a29fd729de301b111a45f434c24834f40df8f4ff116d864589e3249d6",
                unpack=(("drop_dataset/drop_dataset_dev.json", "drop_dataset_dev.json"),),
            ),
        ),
        "CC BY-SA 4.0",
        "evaluation: alignment tax",
    ),
    "quac": Source(
        (
            RemoteFile(
                "https://s3.amazonaws.com/my89public/quac/val_v0.2.json",
                "val_v0.2.json",
                8_929_167,
                "09e622916280ba04c9352acb1bc5bbe80f11a2598f6f34e934c51d9e6570f378",
            ),
        ),
        "CC BY-SA 4.0",
        "evaluation: alignment tax",
    ),
    "wmt15-fr-en": Source(
        (
            RemoteFile(
                "https://www.statmt.org/wmt15/test.tgz",
                "test.tgz",
                unpack=tuple(
                    (f"test/newsdiscusstest2015-fren-{side}.sgm", side)
                    for side in ("src.fr", "ref.en")
                ),
            ),
        ),
        "research use",
        "evaluation: alignment tax, French to English",
    ),
    # An article and its summary a line, without the empty lines of the stories. Copies under other
    # names, with the fields "article" and "highlights", are taken by --from.
    "cnn-dailymail": Source(
        (
            RemoteFile(
                "https://cdn-datasets.huggingface.co/summarization/cnn_dm_v2.tgz",
                "cnn_dm_v2.tgz",
                unpack=tuple(
                    (f"cnn_cln/test.{side}", f"test.{side}") for side in ("source", "target")
                ),
            ),
        ),
        "none stated",
        "evaluation: alignment tax, summaries",
        r"cnn[-_]?(?:dm|dailymail)(?:[^/]*/)?[^/]*\.(?:jsonl|csv)$",
    ),
}
