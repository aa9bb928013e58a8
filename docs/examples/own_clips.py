"""Your own actions in Python: learn from a few clips of each, look at what to expect, keep it, classify, learn more.

    python docs/examples/own_clips.py my_classes new/ --out my.classifier

`my_classes` holds a folder of clips for each class; a clip is a video, a folder of frames or a zip of frames.
"""

import argparse
from pathlib import Path

from soap_net.classify import Classifier
from soap_net.config import load_config
from soap_net.data.find import clips_by_class, find_clips


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("support", type=Path, help="a folder with a folder of clips for each class")
    parser.add_argument("queries", type=Path, nargs="+", help="clips, or folders of clips, to classify")
    parser.add_argument("--out", type=Path, default=Path("my.classifier"))
    parser.add_argument("--backbone", help="another pretrained net; see docs/backbones.md")
    parser.add_argument("--weights", help="its weights")
    options = parser.parse_args()

    # The preset that `soap-net learn` takes; any setting can be changed by options in their usual form.
    changes = [f"--model.{name}={value}" for name in ("backbone", "weights") if (value := getattr(options, name))]
    classifier = Classifier.from_config(load_config("own_clips", changes))
    *first, last = clips_by_class(options.support).items()
    for error in classifier.learn(dict([*first, last])):
        print(f"left out: {error}")
    print(f"learnt {', '.join(f'{name} ({clips})' for name, clips in classifier.counts().items())}")
    if classifier.calibration.expected is not None:  # None where every class has one clip
        print(f"expect {classifier.calibration.expected}")
    classifier.save(options.out)  # one file, without code or video

    again = Classifier.load(options.out)
    for path in options.queries:
        for prediction in again.classify(find_clips(path)):
            if prediction.error:
                print(f"unreadable: {prediction.error}")
                continue
            likeliest = prediction.probabilities[prediction.nearest]
            told = prediction.label or f"none of these, the nearest is {prediction.nearest}"
            print(f"{prediction.clip}: {told} ({100 * likeliest:.0f} %)")

    if len(first) >= 2:
        again.drop(last[0])  # forgets a class; nothing is read anew
        again.add({last[0]: last[1][:1]})  # and learns it again from a single clip
        print(f"now {again.counts()}")


if __name__ == "__main__":
    main()
