"""
Where public data sets and GPT-2's weights are fetched from, under which licence, and what for.

A checksum stands here only where it was taken from a copy at hand or from a public page or project
that states it; the others are recorded on the first download (see download.py). Sizes are in bytes,
as published; a round number is about. URLs are pinned to a revision wherever one is known. The
addresses come from public pages and projects that use them; none was fetched when this table was
written.

Where a set's home offers parquet alone (SST-2, RTE, WSC, CNN/DailyMail), the address is that of an
older release in plain text or JSON. The novels are those of 100_english_novels whose authors died
before 1937. CNN/DailyMail has an article and its summary a line, without the stories' empty lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# A source is a line "name | licence | what it becomes", the folder of its URLs, and its files, each
# with bytes and SHA-256 as far as they are known. A file's URL is the folder's with the file's name
# at the end or in place of {}. "unpack MEMBER NAME" takes a member out of the archive above it.
TABLE = """
gpt2 | MIT (modified) | weights: --init gpt2
https://huggingface.co/openai-community/gpt2/resolve/607a30d783dfa663caf39e06633721c8d4cfcd7e/
config.json 700
model.safetensors 548105171 248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707

gpt2-medium | MIT (modified) | weights: --init gpt2-medium
https://huggingface.co/openai-community/gpt2-medium/resolve/main/
config.json 700
model.safetensors 1520000000 fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd

gpt2-large | MIT (modified) | weights: --init gpt2-large
https://huggingface.co/openai-community/gpt2-large/resolve/main/
config.json 700
model.safetensors 3250000000 5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce

gpt2-xl | MIT (modified) | weights: --init gpt2-xl
https://huggingface.co/openai-community/gpt2-xl/resolve/main/
config.json 700
model.safetensors 6430000000 0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a

gpt2-bpe | MIT (modified) | the tokenizer of every set that is prepared
https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/
vocab.bpe 456318 1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5
encoder.json 1042301 196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783

hh-rlhf | MIT | comparisons, K = 2: prepare hh-rlhf
https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa/{}.jsonl.gz
harmless-base/train 13200000 bf3e1ecd3db61bf21d190f69351d26670c67aababa0fd282fa008c17a7202217
harmless-base/test 742801 ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03
helpful-base/train 16200131 518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4
helpful-base/test 875191 8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b
helpful-online/train 20100000
helpful-online/test 1050000
helpful-rejection-sampled/train 25700000
helpful-rejection-sampled/test 1360000

oasst | Apache-2.0 | comparisons, K = 2..9: prepare oasst
https://huggingface.co/datasets/OpenAssistant/oasst1/resolve/fdf72ae0827c1cda404aff25b6603abec9e3399b/{}.trees.jsonl.gz
2023-04-12_oasst_ready 34145252 2a9a8fd343e9b28e04a895a669d3253f82d93e9c174d440199ae19d5fafbdff7

qa-feedback | Apache-2.0 | comparisons, K = 4: prepare qa-feedback
https://raw.githubusercontent.com/allenai/FineGrainedRLHF/a1469d4eba0b3754bcb343beb88f0aca24bf4848/tasks/qa_feedback/data/{}_feedback.json
train
dev

summarize | modified MIT; posts CC BY 4.0 | comparisons, K = 2: prepare summarize
https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/{}.json
comparisons/batch3
comparisons/batch4
comparisons/batch5
comparisons/batch6
comparisons/batch7
comparisons/batch8
comparisons/batch9
comparisons/batch10

tldr | CC BY 4.0 | demonstrations: prepare tldr; test.jsonl is the evaluation's TL;DR task
https://openaipublic.blob.core.windows.net/summarize-from-feedback/datasets/{}.jsonl
tldr_3_filtered/train
tldr_3_filtered/valid
tldr_3_filtered/test

alpaca | CC BY-NC 4.0 | demonstrations: prepare alpaca
https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/
alpaca_data.json

dolly | CC BY-SA 3.0 | demonstrations: prepare dolly
https://huggingface.co/datasets/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/
databricks-dolly-15k.jsonl 13085339 2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec

lottery | Apache-2.0 | prompts: prepare lottery
https://raw.githubusercontent.com/LAION-AI/Open-Assistant/f1e6ed9526f5817531f3ab85441a40b3671ddccb/model/model_eval/manual/data/{}.jsonl
prompt_lottery_en_250_text 29026 c5c706385a8166d308920e6a2e53b4ffa340d6dda5027cf57e2c39533f4d52f3

novels | public domain | documents to pretrain on: prepare novels
https://raw.githubusercontent.com/computationalstylistics/100_english_novels/143e601875d70e195f2cc5ebd8b034609271194d/corpus/{}.txt
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

shakespeare | public domain | documents to pretrain on: prepare shakespeare
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/
tinyshakespeare/input.txt 1115394 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed

wikitext | CC BY-SA 3.0 | documents to pretrain on: prepare wikitext
https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/word_language_model/data/{}.txt
wikitext-2/train
wikitext-2/valid 1121681 f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8
wikitext-2/test 1256449 d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0

truthfulqa | Apache-2.0 | evaluation: truthfulness
https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/
TruthfulQA.csv
data/mc_task.json

realtoxicityprompts | Apache-2.0 | evaluation: toxicity
https://ai2-public-datasets.s3.amazonaws.com/realtoxicityprompts/
realtoxicityprompts-data.tar.gz
unpack realtoxicityprompts-data/prompts.jsonl prompts.jsonl

toxicity-labels | MIT | evaluation: tweets that the toxicity scorer is trained on
https://raw.githubusercontent.com/t-davidson/hate-speech-and-offensive-language/cb50f7e9eb855a99abc51423bf40df0e26d6fe30/data/
labeled_data.csv 2546446 fcb8bc7c68120ae4af04a5b9acd58585513ede11e1548ebf36a5c2040b6f6281

winogender | MIT | evaluation: bias
https://raw.githubusercontent.com/rudinger/winogender-schemas/master/data/{}.tsv
all_sentences 83644 bd69da16bf228cb8df63fd0843aec2d8b5c36a7f21bf8c7b168bcc83932556c8
templates 14903 496f2e2dc77296bcebcdd8865a8dc5715ce22b772de9abb5f531d5b3114c48a0
occupations-stats 1578 3f7f37c16381a70571356982ea7fe613ac700ad04a6d3b19b9f2be18248df567

crows-pairs | CC BY-SA 4.0 | evaluation: bias
https://raw.githubusercontent.com/nyu-mll/crows-pairs/8aaac11c485473159ec9328a65253a5be9a479dc/data/
crows_pairs_anonymized.csv 437764 dfb36986ce0502abbaf7055b9176da3d08d48e07df1251991b5dfbcbceab9d0c

hellaswag | MIT | evaluation: alignment tax
https://raw.githubusercontent.com/rowanz/hellaswag/master/data/
hellaswag_val.jsonl 12246618 0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588

lambada | CC BY 4.0 | evaluation: alignment tax
https://openaipublic.blob.core.windows.net/gpt-2/data/
lambada_test.jsonl 1819752 4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226

sst2 | none stated | evaluation: alignment tax
https://dl.fbaipublicfiles.com/glue/data/
SST-2.zip 7439277 d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa
unpack SST-2/dev.tsv dev.tsv

rte | none stated | evaluation: alignment tax
https://dl.fbaipublicfiles.com/glue/data/
RTE.zip 697150 6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee
unpack RTE/dev.tsv dev.tsv

wsc | none stated | evaluation: alignment tax
https://dl.fbaipublicfiles.com/glue/superglue/data/v2/
WSC.zip 32751 2ed6dfa94556b4a128ff0441efe365b2e883124e7e6aa00fb8d3a6cb1fd520a9
unpack WSC/val.jsonl val.jsonl

squad2 | CC BY-SA 4.0 | evaluation: alignment tax
https://rajpurkar.github.io/SQuAD-explorer/dataset/
dev-v2.0.json 4370528 80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8

drop | CC BY-SA 4.0 | evaluation: alignment tax
https://s3-us-west-2.amazonaws.com/allennlp/datasets/drop/
drop_dataset.zip 8308692 39d2278a29fd729de301b111a45f434c24834f40df8f4ff116d864589e3249d6
unpack drop_dataset/drop_dataset_dev.json drop_dataset_dev.json

quac | CC BY-SA 4.0 | evaluation: alignment tax
https://s3.amazonaws.com/my89public/quac/
val_v0.2.json 8929167 09e622916280ba04c9352acb1bc5bbe80f11a2598f6f34e934c51d9e6570f378

wmt15-fr-en | research use | evaluation: alignment tax, French to English
https://www.statmt.org/wmt15/
test.tgz
unpack test/newsdiscusstest2015-fren-src.fr.sgm src.fr
unpack test/newsdiscusstest2015-fren-ref.en.sgm ref.en

cnn-dailymail | none stated | evaluation: alignment tax, summaries
https://cdn-datasets.huggingface.co/summarization/
cnn_dm_v2.tgz
unpack cnn_cln/test.source test.source
unpack cnn_cln/test.target test.target
"""


@dataclass
class RemoteFile:
    """One file: where it is, its name under the source's folder, and what is known of it."""

    url: str
    path: str
    size: int | None = None
    sha256: str | None = None
    unpack: tuple[tuple[str, str], ...] = ()  # (member of the archive, name under the folder)


@dataclass
class Source:
    """A set of files that is fetched by one name; `becomes` says what for."""

    licence: str
    becomes: str
    files: list[RemoteFile]


def read_table(table: str) -> dict[str, Source]:
    """Read the table of sources -> {name: source}; its form is described above it."""
    sources = {}
    for block in table.strip().split("\n\n"):
        head, folder, *lines = block.split("\n")
        name, licence, becomes = head.split(" | ")
        folder = folder if "{}" in folder else folder + "{}"
        base, ending = folder.rpartition("/")[0], folder.rpartition("{}")[2]
        source = sources[name] = Source(licence, becomes, [])
        for line in lines:
            first, *known = line.split()
            if first == "unpack":
                source.files[-1].unpack += (tuple(known),)
                continue
            size, sha256 = (*known, None, None)[:2]
            path, size = first + ending, size and int(size)
            source.files.append(RemoteFile(f"{base}/{path}", path, size, sha256))
    return sources


SOURCES = read_table(TABLE)


def is_weights(name: str) -> bool:
    return SOURCES[name].becomes.startswith("weights")


def print_sources(names: Sequence[str] = ()) -> None:
    """Print a line for every source, or for every file of the named ones."""
    for name in names:
        for file in SOURCES[name].files:
            size = f"{file.size:,} bytes" if file.size else "size not known"
            checksum = file.sha256 or "of the first download"
            print(f"{name}/{file.path}: {size}, SHA-256 {checksum}\n    {file.url}")
            for member, path in file.unpack:
                print(f"    {member} is unpacked as {path}")
    if names:
        return
    print(f"{'name':19} {'MB':>8} {'files':>5} {'checked':>7}  {'licence':30} what it becomes")
    for name, source in SOURCES.items():
        megabytes = sum(file.size or 0 for file in source.files) / 1e6
        more = "+" if any(file.size is None for file in source.files) else " "
        known = sum(file.sha256 is not None for file in source.files)
        row = f"{name:19} {megabytes:7,.1f}{more} {len(source.files):5} {known:7}"
        print(f"{row}  {source.licence:30} {source.becomes}")
    print(
        "MB: +, and more in files whose size is not known.\n"
        "checked: files whose SHA-256 is known; that of others is recorded the first time.\n"
        "`--download list NAME` shows the addresses of a source, `--download NAME` fetches it,\n"
        '`--download NAME --from FOLDER` takes copies that lie in a folder. "prepare NAME" is\n'
        "python -m data.real.prepare NAME, which converts."
    )
