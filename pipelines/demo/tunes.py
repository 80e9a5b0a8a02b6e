"""Public-domain tunes and themes, written down from memory by us, as data.

Every tune is in the notation of ``notation.py``: melody only (a few with chords), in its own key and
meter. Long classical themes are shortened to their best-known bars and ornaments are left out; the
arranger harmonises, transposes and orchestrates them. All of them are traditional or by composers who
died before 1930, published before 1925. ``bpm`` counts felt beats a minute (dotted quarters in 6/8).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from pipelines.demo.notation import LeadSheet, parse_tune


@dataclass(frozen=True)
class Tune:
    """A tune: who made it where and when, its frame, and its notes as text."""

    id: str
    title: str
    origin: str
    region: str
    era: str
    style: str
    meter: tuple[int, int]
    key: str
    bpm: float
    text: str
    unit: int = 8


# fmt: off
TUNES: tuple[Tune, ...] = (
    # ------------------------------------------------------------------ classical piano
    Tune("fur-elise", "Für Elise", "Ludwig van Beethoven, 1810", "Germany", "19th century", "classical piano",
         (3, 4), "A minor", 140,
         "e^d | e^deB=dc | A2 zCEA | B2 zE^GB | c2 zEe^d | e^deB=dc | A2 zCEA | B2 zEcB | A2 z Bcd |"
         " e3 Gfe | d3 Fed | c3 Edc | B2 zEe2 | z2 e2 z2 | z ^de^de^d | e^deB=dc | A2 zCEA | B2 zE^GB |"
         " c2 zEe^d | e^deB=dc | A2 zCEA | B2 zEcB | A4"),
    Tune("rondo-alla-turca", "Rondo alla Turca", "Wolfgang Amadeus Mozart, 1783", "Austria", "18th century",
         "classical piano", (2, 4), "A minor", 116,
         "BA^GA | c2z2 dcBc | e2z2 fe^de | ba^ga ba^ga | c'4 a2c'2 | b2a2g2a2 | b2a2g2a2 | b2a2g2^f2 | e4 e2f2 |"
         " g2g2 agfe | d4 e2f2 | g2g2 agfe | d4 c2d2 | e2e2 fedc | B4 c2d2 | e2e2 fedc | B4 BA^GA |"
         " c2z2 dcBc | e2z2 fe^de | ba^ga ba^ga | c'4 a2b2 | c'2b2a2^g2 | a2e2f2d2 | c4 B4 | A4", 16),
    Tune("sonata-facile", "Sonata facile (first theme)", "Wolfgang Amadeus Mozart, 1788", "Austria", "18th century",
         "classical piano", (4, 4), "C major", 126,
         "c4 e2g2 | B3c/d/ c2z2 | a4 g2c'2 | g2f2 e2z2 | A/B/c/d/e/f/g/a/ g/f/e/d/c/B/A/G/ |"
         " G/A/B/c/d/e/f/g/ f/e/d/c/B/A/G/F/ | F/G/A/B/c/d/e/f/ e/d/c/B/A/G/F/E/ |"
         " E/F/G/A/B/c/d/e/ d/c/B/A/G/F/E/D/ | c4 e2g2 | B3c/d/ c2z2 | a4 g2c'2 | g2f2 e2z2 |"
         " f2a2 e2g2 | d2f2 c2e2 | d4 B4 | c8"),
    Tune("gymnopedie", "Gymnopédie No. 1", "Erik Satie, 1888", "France", "19th century", "ambient", (3, 4),
         "D major", 76,
         '"Gmaj7" z3 | "Dmaj7" z3 | "Gmaj7" z f a | "Dmaj7" g f c | "Gmaj7" B c d | "Dmaj7" A3 |'
         ' "Gmaj7" F3- | "Dmaj7" F3- | "Gmaj7" F3- | "Dmaj7" F3 | "Gmaj7" z f a | "Dmaj7" g f c | "Gmaj7" B c d |'
         ' "Dmaj7" A3 | "Gmaj7" c3 | "F#m" f3 | "Bm" E3- | "Em" E3 | "A7" G3 | "D" F3', 4),
    # ------------------------------------------------------------------ baroque strings
    Tune("minuet-g", "Minuet in G", "Christian Petzold, about 1725", "Germany", "baroque", "baroque strings", (3, 4),
         "G major", 124,
         "d2 GABc | d2 G2 G2 | e2 cdef | g2 G2 G2 | c2 dcBA | B2 cBAG | F2 GABG | A6 | d2 GABc | d2 G2 G2 |"
         " e2 cdef | g2 G2 G2 | c2 dcBA | B2 cBAG | A2 BAGF | G6"),
    Tune("jesu-joy", "Jesu, Joy of Man's Desiring", "Johann Sebastian Bach, 1723", "Germany", "baroque",
         "baroque strings", (9, 8), "G major", 76,
         "zGA Bdc ced | dgf gdB GAB | cde dcB ABG | FGA DFA cBA | BGA Bdc ced | dgf gdB GAB | Edc BAG DGF | G9"),
    Tune("canon", "Canon in D", "Johann Pachelbel, about 1690", "Germany", "baroque", "baroque strings", (4, 4),
         "D major", 84,
         '"D" f4 "A" e4 | "Bm" d4 "F#m" c4 | "G" B4 "D" A4 | "G" B4 "A" c4 |'
         ' "D" d4 "A" c4 | "Bm" B4 "F#m" A4 | "G" G4 "D" F4 | "G" G4 "A" E4 |'
         ' "D" d2f2 "A" a2g2 | "Bm" f2d2 "F#m" f2e2 | "G" d2B2 "D" d2a2 | "G" g2b2 "A" a2g2 |'
         ' "D" fdef "A" edce | "Bm" dBcd "F#m" cAcA | "G" BGAB "D" AFGA | "G" BABd "A" c2e2'),
    Tune("bourree-e", "Bourrée in E minor", "Johann Sebastian Bach, about 1712", "Germany", "baroque",
         "baroque strings", (4, 4), "E minor", 132,
         "ef | g2fe ^d2ef | B2^c^d e2=d=c | B2AG F2GA | BAGF E2ef | g2fe ^d2ef | B2^c^d e2=d=c | B2AG F3G | G6"),
    Tune("spring", "Spring (first theme)", "Antonio Vivaldi, 1725", "Italy", "baroque", "baroque strings", (4, 4),
         "E major", 108,
         "E2 | G2G2 G2FE | B6 BA | G2G2 G2FE | B6 BA | G2AB A2G2 | F4 z2 e2 | B2AG A2B2 | c2B4 e2 |"
         " B2AG A2B2 | c2B2 A2G2 | F3E F2G2 | E6"),
    # ------------------------------------------------------------------ ragtime
    Tune("entertainer", "The Entertainer", "Scott Joplin, 1902", "United States", "early 20th century", "ragtime",
         (2, 4), "C major", 76,
         "D^D | Ec2E c2Ec- | c5 cd^d | ecde2Bd2 | c4- c2D^D | Ec2E c2Ec- | c6 AG | ^FAce2dcA | d4- d2D^D |"
         " Ec2E c2Ec- | c5 cd^d | ecde2Bd2 | c4- c2cd | ecde2cdc | ecde2cdc | ecde2Bd2 | c6", 16),
    Tune("polly-wolly", "Polly Wolly Doodle", "traditional, 19th century", "United States", "19th century",
         "ragtime", (4, 4), "C major", 152,
         "C2D2 | E4E4 | C4C4 | E2E2E2F2 | G2F2E2C2 | D4D4 | B,4B,4 | D2D2D2E2 | F2E2D2B,2 | E4E4 | C4C4 |"
         " E2E2E2F2 | G2F2E2C2 | A4A4 | G4E4 | G2F2E2D2 | C4"),
    Tune("camptown", "Camptown Races", "Stephen Foster, 1850", "United States", "19th century", "ragtime", (4, 4),
         "G major", 160,
         "d2d2B2d2 | e2d2B4 | B2A6 | B2A6 | d2d2B2d2 | e2d2B4 | A4B2A2 | G8 | G3GB2d2 | g8 | e3eg2e2 | d8 |"
         " d2d2B2d2 | e2d2B4 | A2BcB2A2 | G8"),
    Tune("daisy-bell", "Daisy Bell", "Harry Dacre, 1892", "England", "19th century", "ragtime", (3, 4), "G major",
         168,
         "d3 | B3 | G3 | D3 | EFG | E2G | D3- | D3 | A3 | d3 | B3 | G3 | EFG | A2B | A3- | A2B | cBA | d2B |"
         " AG2- | G2A | B2G | E2G | ED2- | D2D | G2B | A2D | G2B | ABc | dBG | A2D | G3- | G3", 4),
    # ------------------------------------------------------------------ bluegrass
    Tune("oh-susanna", "Oh! Susanna", "Stephen Foster, 1848", "United States", "19th century", "bluegrass", (4, 4),
         "G major", 176,
         "GA | B2d2d3e | d2B2G3A | B2B2A2G2 | A6GA | B2d2d3e | d2B2G3A | B2B2A2A2 | G6z2 | c4c4 | e2e4e2 |"
         " d2d2B2G2 | A6GA | B2d2d3e | d2B2G3A | B2B2A2A2 | G6"),
    Tune("cabbage", "Boil Them Cabbage Down", "traditional", "United States", "19th century", "bluegrass", (4, 4),
         "G major", 168,
         "B2BBB2B2 | c2ccc2c2 | B2BBB2B2 | A2AAA2A2 | B2BBB2B2 | c2ccc2c2 | B2B2A2A2 | G8 |"
         " d2dBd2B2 | e2ece2c2 | d2dBd2B2 | A2ABA2F2 | d2dBd2B2 | e2ece2c2 | B2G2A2F2 | G8"),
    Tune("round-the-mountain", "She'll Be Coming 'Round the Mountain", "traditional, 19th century", "United States",
         "19th century", "bluegrass", (4, 4), "G major", 184,
         "D2E2 | G2G2G2G2 | E2D2B,2D2 | G8- | G4G2A2 | B2B2B2B2 | d2B2A2G2 | A8- | A4d2c2 | B2B2B2B2 |"
         " A2G2G2G2 | E2E2E2E2 | A2G2F2E2 | D2D2D2D2 | B2A2E2F2 | G8- | G4"),
    Tune("red-river-valley", "Red River Valley", "traditional, 19th century", "Canada", "19th century", "bluegrass",
         (4, 4), "G major", 160,
         "D2G2 | B4B2A2 | G4A2G2 | E8 | z4D2G2 | B4G2B2 | d4c2B2 | A8- | A4d2c2 | B4B2A2 | G4A2B2 | d4c4 |"
         " z4E2E2 | D4F2G2 | A4B2A2 | G8- | G4"),
    Tune("clementine", "Oh My Darling, Clementine", "traditional, 1884", "United States", "19th century",
         "bluegrass", (3, 4), "G major", 132,
         "GG | G2D2BB | B2G2GB | d2d2cB | A4AB | c2c2BA | B2G2GB | A2D2FA | G4GG | G2D2BB | B2G2GB | d2d2cB |"
         " A4AB | c2c2BA | B2G2GB | A2D2FA | G4"),
    Tune("skip-to-my-lou", "Skip to My Lou", "traditional, 19th century", "United States", "19th century",
         "bluegrass", (4, 4), "G major", 176,
         "B2B2G2G2 | B2BBd4 | A2A2F2F2 | A2AAc4 | B2B2G2G2 | B2BBd4 | A2BcB2A2 | G4G4"),
    # ------------------------------------------------------------------ celtic
    Tune("scarborough-fair", "Scarborough Fair", "traditional, 17th century", "England", "renaissance", "celtic",
         (3, 4), "D dorian", 112,
         "D2D | A2A | E3/2F/2E | D3 | zAc | d2c | ABG | A3 | z2d | d2d | c2A | AGF | EC2 | D2A | G2F | EDC | D3", 4),
    Tune("greensleeves", "Greensleeves", "traditional, 16th century", "England", "renaissance", "celtic", (6, 8),
         "A minor", 60,
         "A | c2de>^fe | d2BG>AB | c2AA>^GA | B2^GE2A | c2de>^fe | d2BG>AB | c>BA^G>^F^G | A3A3 | g3g>^fe |"
         " d2BG>AB | c2AA>^GA | B2^GE3 | g3g>^fe | d2BG>AB | c>BA^G>^F^G | A3-A2"),
    Tune("irish-washerwoman", "The Irish Washerwoman", "traditional, 18th century", "Ireland", "18th century",
         "celtic", (6, 8), "G major", 108,
         "dc | BGG DGG | BGB dcB | cAA EAA | cAc edc | BGG DGG | BGB dcB | cBc Adc | BGG G3 | gdg gdg |"
         " gdg bag | fdf fdf | fdf agf | egg dgg | cgg Bgg | cBc Adc | BGG G"),
    Tune("swallowtail", "The Swallowtail Jig", "traditional, 19th century", "Ireland", "19th century", "celtic",
         (6, 8), "E dorian", 110,
         "GEE BEE | GEG BAG | FDD ADD | dcd AGF | GEE BEE | GEG B2c | dcB AGF | GEE E3 | Bcd e2f | e2f edB |"
         " Bcd e2f | edB d3 | Bcd e2f | e2f edB | dBB AGF | GEE E3"),
    Tune("kesh-jig", "The Kesh Jig", "traditional, 19th century", "Ireland", "19th century", "celtic", (6, 8),
         "G major", 112,
         "G2G GAB | A2A ABd | edd gdd | edB dBA | G2G GAB | A2A ABd | edd gdd | BAF G3 | B2B dBd | ege dBG |"
         " B2B dBG | ABA AGA | B2B dBd | ege dBd | gfg aga | bgg g3"),
    Tune("drowsy-maggie", "Drowsy Maggie", "traditional, 19th century", "Ireland", "19th century", "celtic", (4, 4),
         "E dorian", 184,
         "E2BE dEBE | E2BE AFDF | E2BE dEBE | BABc dAFD | E2BE dEBE | E2BE AFDF | E2BE dEBE | BABc dAFD |"
         " d2fd c2ec | defg afge | d2fd c2ec | BABc dAFA | d2fd c2ec | defg afge | afge fdec | BABc dAFD"),
    Tune("auld-lang-syne", "Auld Lang Syne", "traditional, words by Robert Burns, 1788", "Scotland", "18th century",
         "celtic", (4, 4), "G major", 108,
         "D2 | G3GG2B2 | A3GA2B2 | G3GB2d2 | e6e2 | d3BB2G2 | A3GA2BA | G3EE2D2 | G6e2 | d3BB2G2 | A3GA2e2 |"
         " d3BB2d2 | e6e2 | d3BB2G2 | A3GA2BA | G3EE2D2 | G6"),
    Tune("skye-boat-song", "The Skye Boat Song", "traditional, 19th century", "Scotland", "19th century", "celtic",
         (6, 8), "G major", 66,
         "D>EDG2G | A>BAd3 | B>ABE2E | D3-D3 | D>EDG2G | A>BAd3 | B>ABE2F | G3-G3 | B>GBB3 | A>EAA3 |"
         " G>EGG2G | E3-E3 | B>GBB3 | A>EAA3 | G>EGE2F | D3-D3"),
    Tune("londonderry-air", "Londonderry Air", "traditional, 1855", "Ireland", "19th century", "celtic", (4, 4),
         "C major", 80,
         "B,CD | E3D EAGE | DC A,4 B,C | E2F2 G3A | GEC2 D4 | z B,CD E3D | EAGE DCA,2 | z B,CD E3F | EDCD C4 |"
         " z GAB c3B | BAGA GEC2 | z GAB c3B | BAGE D4 | z GGG e3d | dcAc GEC2 | z B,CD EAGE | DCA,B, C4"),
    Tune("scotland-the-brave", "Scotland the Brave", "traditional, 19th century", "Scotland", "19th century",
         "celtic", (4, 4), "D major", 112,
         "D2D>E F>DF>A | d2d>c d>AF>D | G2B>G F2A>F | E2A>A A>GF>E | D2D>E F>DF>A | d2d>c d>AF>D |"
         " G2B>G F2A>F | E2D>E D4 | f2f>e d2d>c | B2A>B A>FD2 | G2B>G F2A>F | E2A>A A>GF>E"
         " | D2D>E F>DF>A | d2d>c d>AF>D | G2B>G F2A>F | E2D>E D4"),
    # ------------------------------------------------------------------ swing
    Tune("saints", "When the Saints Go Marching In", "traditional spiritual", "United States", "19th century",
         "swing", (4, 4), "F major", 152,
         "z2F2A2B2 | c8 | z2F2A2B2 | c8 | z2F2A2B2 | c4A4 | F4A4 | G8 | z2A2A2G2 | F6F2 | A4c4 | c2B6 |"
         " z4A2B2 | c4A4 | F4G4 | F8"),
    Tune("swing-low", "Swing Low, Sweet Chariot", "Wallace Willis, about 1865", "United States", "19th century",
         "swing", (4, 4), "F major", 116,
         "A4F4 | A2F2F2DC | FFFFA2c2 | c8 | d4c2A2 | c2F2F2DC | FFFFA2G2 | F8 |"
         " AAA2F2F2 | AAF2F2DC | FFFFA2c2 | c8 | d2c2A2c2 | c2F2F2DC | FFFFA2G2 | F8"),
    Tune("joshua", "Joshua Fit the Battle of Jericho", "traditional spiritual", "United States", "19th century",
         "swing", (4, 4), "D minor", 144,
         "D^CDEF2FG | A2AAA2z2 | G2GGG2z2 | A2AAA2z2 | D^CDEF2FG | A4A4 | A2d2AGFE | D6z2 |"
         " D2F2A2AA | A2G2F2D2 | D2F2A2AA | A6z2 | A2d2d2dd | c2A2G2F2 | A2d2AGFE | D6z2"),
    # ------------------------------------------------------------------ blues rock
    Tune("rising-sun", "The House of the Rising Sun", "traditional", "United States", "19th century", "blues rock",
         (6, 8), "A minor", 76,
         '"Am" A3"C"A2B | "D"c2e"F"d2A | "Am"a3"C"a2g | "E"e6 | "Am"a3"C"a2g | "D"e2d"F"A3 | "Am"A3"E"^G2E |'
         ' "Am"A6 | "Am" A3"C"A2B | "D"c2e"F"d2A | "Am"a3"C"a2g | "E"e6 | "Am"a2a"C"a2g | "D"e2d"F"A3 |'
         ' "E"B2A"E"^G2E | "Am"A6'),
    Tune("go-down-moses", "Go Down, Moses", "traditional spiritual", "United States", "19th century", "blues rock",
         (4, 4), "A minor", 108,
         "E2 | c2c2B2B2 | c2c2A4 | z2E2E2^G2 | ^G2A4E2 | c2c2B2B2 | c2c2A4 | z2E2E2^G2 | ^G2A6 | A4A4 |"
         " d4d4 | e2e2d2e2 | c2A4z2 | A2A2A4 | d2d2d4 | e2c2B2^G2 | A6"),
    # ------------------------------------------------------------------ electronic
    Tune("korobeiniki", "Korobeiniki", "traditional, 1861", "Russia", "19th century", "electronic dance", (4, 4),
         "A minor", 138,
         "e2Bcd2cB | A2Ace2dc | B3cd2e2 | c2A2A4 | zd2fa2gf | e3ce2dc | B2Bcd2e2 | c2A2A4 |"
         " e4c4 | d4B4 | c4A4 | ^G4B4 | e4c4 | d4B4 | c2e2a4 | ^g8"),
    Tune("kalinka", "Kalinka", "Ivan Larionov, 1860", "Russia", "19th century", "electronic dance", (4, 4),
         "A minor", 132,
         "e2 | d2Bcd2Bc | d2cBA2e2 | d2Bcd2Bc | d2cBA2e2 | f2efg2fe | d2cBA2e2 | d2Bcd2Bc | d2cBA2"),
    Tune("mountain-king", "In the Hall of the Mountain King", "Edvard Grieg, 1875", "Norway", "19th century",
         "electronic dance", (4, 4), "A minor", 130,
         "ABcd ece2 | ^dB^d2 =d_B=d2 | ABcd ecea | gece g4 | ABcd ece2 | ^dB^d2 =d_B=d2 | ABcd ecea | gece g4 |"
         " e^f^ga b^gb2 | c'^gc'2 b^gb2 | e^f^ga b^gb2 | c'^gc'2 b4 | ABcd ece2 | ^dB^d2 =d_B=d2 |"
         " ABcd ecea | gece a4"),
    # ------------------------------------------------------------------ ambient
    Tune("morning-mood", "Morning Mood", "Edvard Grieg, 1875", "Norway", "19th century", "ambient", (6, 8),
         "E major", 50,
         "bgf efg | bgf ef/g/f | bgb c'gc' | bgf e3 | bgf efg | bgf ef/g/f | bgb c'gc' | bgf e3"),
    Tune("new-world-largo", "Largo from the New World", "Antonín Dvořák, 1893", "Czechia", "19th century", "ambient",
         (4, 4), "C major", 66,
         "E3GG4 | E3DC4 | D3EG3E | D8 | E3GG4 | E3DC4 | D2E2D3C | C8 | A2c2c4 | B2GAA4 | A2c2B2GA | A8 |"
         " E3GG4 | E3DC4 | D2E2D3C | C8"),
    # ------------------------------------------------------------------ latin
    Tune("la-cucaracha", "La Cucaracha", "traditional, 19th century", "Mexico", "19th century", "bossa nova", (4, 4),
         "G major", 132,
         "DDD | G2zBzDDD | G2zBz4 | G2GFFEED | D4zDDD | F2zAzDDD | F2zAz4 | d2edcBAG | G4zDDD | G2zBzDDD | G2zBz4 |"
         " G2GFFEED | D4zDDD | F2zAzDDD | F2zAz4 | d2edcBAG | G4z"),
    # ------------------------------------------------------------------ music box
    Tune("twinkle", "Ah vous dirai-je, maman", "traditional, 1761", "France", "18th century", "music box", (4, 4),
         "C major", 100,
         "C2C2G2G2 | A2A2G4 | F2F2E2E2 | D2D2C4 | G2G2F2F2 | E2E2D4 | G2G2F2F2 | E2E2D4 | C2C2G2G2 | A2A2G4 |"
         " F2F2E2E2 | D2D2C4"),
    Tune("brahms-lullaby", "Lullaby", "Johannes Brahms, 1868", "Germany", "19th century", "music box", (3, 4),
         "C major", 84,
         "EE | G4EE | G4EG | c2B2A2 | A2G2DE | F2D2DE | F4DF | BAG2B2 | c4CC | c4AF | G4EC | F2G2A2 | G4CC |"
         " c4AF | G4EC | FGFED2 | C4"),
    Tune("frere-jacques", "Frère Jacques", "traditional, 18th century", "France", "18th century", "music box",
         (4, 4), "F major", 104,
         "F2G2A2F2 | F2G2A2F2 | A2B2c4 | A2B2c4 | cdcBA2F2 | cdcBA2F2 | F2C2F4 | F2C2F4"),
    Tune("au-clair", "Au clair de la lune", "traditional, 18th century", "France", "18th century", "music box",
         (4, 4), "G major", 104,
         "G2G2G2A2 | B4A4 | G2B2A2A2 | G8 | G2G2G2A2 | B4A4 | G2B2A2A2 | G8 | A2A2A2A2 | E4E4 | A2G2F2E2 |"
         " D8 | G2G2G2A2 | B4A4 | G2B2A2A2 | G8"),
    Tune("silent-night", "Silent Night", "Franz Xaver Gruber, 1818", "Austria", "19th century", "music box", (6, 8),
         "C major", 48,
         "G>AGE3 | G>AGE3 | d2dB3 | c2cG3 | A2Ac>BA | G>AGE3 | A2Ac>BA | G>AGE3 | d2df>dB | c3e3 | c>GEG>FD | C6"),
    Tune("row-your-boat", "Row, Row, Row Your Boat", "traditional, 1852", "United States", "19th century",
         "music box", (6, 8), "C major", 76,
         "C3C3 | C2DE3 | E2DE2F | G6 | cccGGG | EEECCC | G2FE2D | C6"),
    Tune("london-bridge", "London Bridge", "traditional, 18th century", "England", "18th century", "music box",
         (4, 4), "C major", 112,
         "G3AG2F2 | E2F2G4 | D2E2F4 | E2F2G4 | G3AG2F2 | E2F2G4 | D4G4 | E2C6"),
    # ------------------------------------------------------------------ brass march
    Tune("yankee-doodle", "Yankee Doodle", "traditional, 18th century", "United States", "18th century",
         "brass march", (4, 4), "G major", 120,
         "G2G2A2B2 | G2B2A2D2 | G2G2A2B2 | G4F2D2 | G2G2A2B2 | c2B2A2G2 | F2D2E2F2 | G4G4 | E3FE2D2 |"
         " E2F2G4 | D3ED2C2 | B,4D4 | E3FE2D2 | E2F2G2E2 | D2G2F2A2 | G4G4"),
    Tune("battle-hymn", "John Brown's Body", "traditional, 1850s", "United States", "19th century", "brass march",
         (4, 4), "C major", 108,
         "G>GG>F E>Gc>d | e2e>d c2c>B | A>AA>B c>Bc>A | G2G>E G4 | G>GG>F E>Gc>d | e2e>d c2c2 | d2d2c2B2 |"
         " c4z4 | G3F E>Gc>d | e4c4 | A3B c>Bc>A | G4E4 | G3F E>Gc>d | e4c2c2 | d2d2c2B2 | c8"),
    Tune("god-save", "God Save the King", "traditional, 1744", "England", "18th century", "brass march", (3, 4),
         "G major", 96,
         "G2G2A2 | F3GA2 | B2B2c2 | B3AG2 | A2G2F2 | G6 | d2d2d2 | d3cB2 | c2c2c2 | c3BA2 | B2cBAG | B2c2d2 |"
         " ecB2A2 | G6"),
    Tune("jingle-bells", "Jingle Bells", "James Lord Pierpont, 1857", "United States", "19th century", "brass march",
         (4, 4), "G major", 126,
         "B2B2B4 | B2B2B4 | B2d2G3A | B8 | c2c2c3c | c2B2B2BB | B2A2A2B2 | A4d4 | B2B2B4 | B2B2B4 | B2d2G3A |"
         " B8 | c2c2c3c | c2B2B2BB | d2d2c2A2 | G8"),
    Tune("marseillaise", "La Marseillaise", "Claude Joseph Rouget de Lisle, 1792", "France", "18th century",
         "brass march", (4, 4), "G major", 112,
         "D/D3/2D/ | G2G2A2A2 | d3BG>GB>G | E2c4A>F | G6GA | B2B2B2cB | B2A2z2AB | c2c2c2dc | B4z2d>d |"
         " d2B>Gd2B>G | D4z2D>D | F4A2c2 | B4A4 | G6"),
    Tune("can-can", "Can-can", "Jacques Offenbach, 1858", "France", "19th century", "brass march", (2, 4), "C major",
         138,
         "DFED | G2G2 | GAEF | D2D2 | DFED | CcBA | GFED | CGEG | DFED | G2G2 | GAEF | D2D2 | DFED | CcBA | GFED | C4"),
    Tune("william-tell", "William Tell (gallop)", "Gioachino Rossini, 1829", "Italy", "19th century", "brass march",
         (2, 4), "C major", 138,
         "GG | G2GGG2GG | c2d2e2GG | G2GGc2ee | d2B2G2GG | G2GGG2GG | c2d2e2ce | g6fe | d2c2e2GG | G2GGG2GG |"
         " c2d2e2GG | G2GGc2ee | d2B2G2GG | G2GGG2GG | c2d2e2ce | g4fedc | B2d2c2", 16),
    # ------------------------------------------------------------------ koto
    Tune("sakura", "Sakura, Sakura", "traditional, Edo period", "Japan", "19th century", "koto", (4, 4), "A minor",
         84,
         "A2A2B4 | A2A2B4 | A2B2c2B2 | A2BAF4 | E2C2E2F2 | E2ECB,4 | A2B2c2B2 | A2BAF4 | E2C2E2F2 | E2ECB,4 |"
         " A2A2B4 | A2A2B4 | E2F2BAF2 | E8"),
    Tune("kojo-no-tsuki", "Kōjō no tsuki", "Rentarō Taki, 1901", "Japan", "early 20th century", "koto", (4, 4),
         "A minor", 76,
         "E2E2A2B2 | c2B2A4 | F2F2E2D2 | E6z2 | E2E2A2B2 | c2B2A4 | F2D2E2E2 | A,6z2"),
    Tune("mo-li-hua", "Mo Li Hua (Jasmine Flower)", "traditional, 18th century", "China", "18th century", "koto",
         (4, 4), "C major", 88,
         "E2EGAccA | G2GAG4 | E2EGAccA | G2GAG4 | G2G2G2EG | A2A2G4 | E2DEG2ED | C2CDC4 | EDCED3E | G2AcG4 |"
         " D2EGDECA, | G,8 | D3ECDCA, | G,8"),
    Tune("arirang", "Arirang", "traditional, 19th century", "Korea", "19th century", "koto", (3, 4), "G major", 92,
         "D3EDE | G3AGA | B2AGED | D3EDE | G3AGA | BAGEDE | G3AG2 | G6 | d2d2d2 | d2B2A2 | B2AGED | D3EDE |"
         " G3AGA | BAGEDE | G3AG2 | G6"),
    # ------------------------------------------------------------------ organ hymn
    Tune("amazing-grace", "Amazing Grace", "New Britain, 1829", "United States", "19th century", "organ hymn",
         (3, 4), "G major", 84,
         "D2 | G4BG | B4A2 | G4E2 | D4D2 | G4BG | B4A2 | d6- | d4Bd | d4BG | B4A2 | G4E2 | D4D2 | G4BG | B4A2 |"
         " G6- | G4"),
    Tune("old-hundredth", "Old Hundredth", "Loys Bourgeois, 1551", "France", "renaissance", "organ hymn", (4, 4),
         "G major", 84,
         "G | GFED | GABB | BBAG | cBAG | ABAG | EFGd | BGAc | BAG", 4),
    Tune("ode-to-joy", "Ode to Joy", "Ludwig van Beethoven, 1824", "Germany", "19th century", "organ hymn", (4, 4),
         "D major", 108,
         "FFGA | AGFE | DDEF | F>EE2 | FFGA | AGFE | DDEF | E>DD2 | EEFD | EF/G/FD | EF/G/FE | DEA,2 | FFGA |"
         " AGFE | DDEF | E>DD2", 4),
    Tune("mighty-fortress", "A Mighty Fortress", "Martin Luther, 1529", "Germany", "renaissance", "organ hymn",
         (4, 4), "C major", 88,
         "c | ccGA/B/ | cB/A/Gc | BAGA | F/E/DCc | ccGA/B/ | cB/A/Gc | BAGA | F/E/DC", 4),
    Tune("joy-to-the-world", "Joy to the World", "Lowell Mason, 1839", "United States", "19th century", "organ hymn",
         (2, 4), "D major", 76,
         "d4c3B | A6G2 | F4E4 | D6A2 | B6B2 | c6c2 | d6d2 | d2c2B2A2 | A3GF2d2 | d2c2B2A2 | A3GF2F2 | F2F2F2FG |"
         " A6GF | E2E2E2EF | G6FE | D2d4B2 | A3GF2G2 | F4E4 | D8", 16),
    Tune("nicaea", "Holy, Holy, Holy", "John Bacchus Dykes, 1861", "England", "19th century", "organ hymn", (4, 4),
         "D major", 92,
         "D2D2F2F2 | A4A4 | B6B2 | B4A4 | A3AA2A2 | d4c2A2 | E2A2B3A | A8 | D2D2F2F2 | A6A2 | B6B2 | A4A4 |"
         " d4A4 | B4F4 | G2E2E3D | D8"),
    Tune("god-rest-ye", "God Rest Ye Merry, Gentlemen", "traditional, 17th century", "England", "baroque",
         "organ hymn", (4, 4), "E minor", 116,
         "E | EBBA | GFED | EFGA | B3E | EBBA | GFED | EFGA | B3B | cABc | deBA | GEFG | A2GA | B2cB | BAGF |"
         " E2GF/E/ | A2GA | B2cd | eBAG | FGAF | E3", 4),
    Tune("deck-the-halls", "Deck the Halls", "traditional, 16th century", "Wales", "renaissance", "brass march",
         (4, 4), "D major", 138,
         "A3GF2E2 | D2E2F2D2 | EFGEF3E | D2C2D4 | A3GF2E2 | D2E2F2D2 | EFGEF3E | D2C2D4 | E3FG2E2 | F3GA2E2 |"
         " F^GA2Bcd2 | c2B2A4 | A3GF2E2 | D2E2F2D2 | BBBBA3G | F2E2D4"),
)
# fmt: on

BY_ID: dict[str, Tune] = {tune.id: tune for tune in TUNES}


@cache
def sheet(tune_id: str) -> LeadSheet:
    """The parsed lead sheet of a tune (do not modify: it is shared)."""
    if tune_id not in BY_ID:
        raise KeyError(f"no tune {tune_id!r}; the tunes are {sorted(BY_ID)}")
    tune = BY_ID[tune_id]
    try:
        return parse_tune(tune.text, tune.meter, tune.key, tune.unit)
    except ValueError as err:
        raise ValueError(f"tune {tune_id!r}: {err}") from err
