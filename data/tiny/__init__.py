"""The tiny world: a closed world whose facts are known, and all data that is made from it.

Twelve animals and eight people have 64 facts. Because the facts are known, truth in free text can
be checked, and every claim of the paper can be measured without people. In order:

    world.py     draws the facts from a seed, and finds the facts that a text states (`claims`).
                 Some facts the web gets wrong, and some are held out of all feedback
    tasks.py     what people ask: prompts of the paper's ten use cases, each with its `task`, the
                 request in machine-readable form, which models never see
    answers.py   good answers to every task, and answers with human failings
    corpus.py    an imitation web to pretrain on: partly false, partly rude, partly useful
    probes.py    test prompts of one question type each, such as false premises
    make.py      the command: users write prompts, the prompts are cleaned and split by user as in
                 the paper (data/hygiene.py), demonstrators answer, a tokenizer is trained
    card.py      the tables of what was made, in the form of the paper's

Then models are trained on the web and the demonstrations, and sampled (train_sft.py, sample.py).

    grader.py    the truth about a response: helpful, truthful, harmless, from text and facts alone
    labelers.py  people who see those marks through their own weights and noise, and rank the
                 responses (data/label.py); two of them agree on 73 % of pairs, as the paper's did

Reward model and PPO learn from the rankings alone; evaluate.py asks the grader again.
"""
