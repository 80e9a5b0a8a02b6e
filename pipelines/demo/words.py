"""Words for titles and for descriptions in nine languages, as data.

Each table row reads: English key, then Spanish, French, German, Portuguese, Japanese, Chinese, Arabic and
Hindi, separated by bars. Nouns are in the form that the sentences of ``rows.py`` need (no articles).
"""

# ruff: noqa: E501

from __future__ import annotations

# fmt: off
LANGUAGES = ("es", "fr", "de", "pt", "ja", "zh", "ar", "hi")

_INSTRUMENTS = """
piano|piano|piano|Klavier|piano|ピアノ|钢琴|بيانو|पियानो
honky-tonk piano|piano honky-tonk|piano honky-tonk|Honky-Tonk-Klavier|piano honky-tonk|ホンキートンクピアノ|酒吧钢琴|بيانو هونكي تونك|होंकी-टोंक पियानो
electric piano|piano eléctrico|piano électrique|E-Piano|piano elétrico|エレクトリックピアノ|电钢琴|بيانو كهربائي|इलेक्ट्रिक पियानो
harpsichord|clave|clavecin|Cembalo|cravo|チェンバロ|羽管键琴|هاربسيكورد|हार्पसीकॉर्ड
celesta|celesta|célesta|Celesta|celesta|チェレスタ|钢片琴|تشيلستا|सेलेस्टा
glockenspiel|glockenspiel|glockenspiel|Glockenspiel|glockenspiel|グロッケンシュピール|钟琴|غلوكنشبيل|ग्लॉकेनश्पील
music box|caja de música|boîte à musique|Spieldose|caixa de música|オルゴール|八音盒|صندوق موسيقى|म्यूज़िक बॉक्स
vibraphone|vibráfono|vibraphone|Vibraphon|vibrafone|ヴィブラフォン|颤音琴|فيبرافون|वाइब्राफ़ोन
church organ|órgano de iglesia|orgue d'église|Kirchenorgel|órgão de igreja|パイプオルガン|教堂管风琴|أرغن كنسي|चर्च ऑर्गन
pipe organ flutes|flautas de órgano|jeux de flûtes d'orgue|Orgelflöten|flautas de órgão|オルガンのフルート管|管风琴长笛音栓|أنابيب أرغن ناعمة|ऑर्गन की बाँसुरी-नलियाँ
accordion|acordeón|accordéon|Akkordeon|acordeão|アコーディオン|手风琴|أكورديون|अकॉर्डियन
nylon guitar|guitarra clásica|guitare classique|Konzertgitarre|violão|ナイロン弦ギター|尼龙弦吉他|غيتار كلاسيكي|नायलॉन गिटार
steel guitar|guitarra acústica|guitare folk|Westerngitarre|violão de cordas de aço|アコースティックギター|民谣吉他|غيتار أكوستيك|अकूस्टिक गिटार
jazz guitar|guitarra de jazz|guitare jazz|Jazzgitarre|guitarra de jazz|ジャズギター|爵士吉他|غيتار جاز|जैज़ गिटार
overdriven guitar|guitarra saturada|guitare saturée|übersteuerte E-Gitarre|guitarra com overdrive|オーバードライブギター|过载电吉他|غيتار أوفردرايف|ओवरड्राइव गिटार
distortion guitar|guitarra distorsionada|guitare distordue|verzerrte E-Gitarre|guitarra distorcida|ディストーションギター|失真电吉他|غيتار ديستورشن|डिस्टॉर्शन गिटार
double bass|contrabajo|contrebasse|Kontrabass|contrabaixo|コントラバス|低音提琴|كونترباص|डबल बेस
bass guitar|bajo eléctrico|basse électrique|E-Bass|baixo elétrico|エレキベース|电贝斯|غيتار باص|बेस गिटार
synth bass|bajo sintetizado|basse synthétique|Synthesizerbass|baixo sintetizado|シンセベース|合成器贝斯|باص إلكتروني|सिंथ बेस
violin|violín|violon|Violine|violino|ヴァイオリン|小提琴|كمان|वायलिन
viola|viola|alto|Bratsche|viola|ヴィオラ|中提琴|فيولا|वियोला
cello|violonchelo|violoncelle|Cello|violoncelo|チェロ|大提琴|تشيلو|चेलो
harp|arpa|harpe|Harfe|harpa|ハープ|竖琴|هارب|हार्प
string section|cuerdas|section de cordes|Streicher|cordas|ストリングス|弦乐组|وتريات|स्ट्रिंग्स
synth strings|cuerdas sintetizadas|cordes synthétiques|Synthesizer-Streicher|cordas sintetizadas|シンセストリングス|合成弦乐|وتريات إلكترونية|सिंथ स्ट्रिंग्स
choir|coro|chœur|Chor|coro|コーラス|合唱音色|كورال|कोरस
trumpet|trompeta|trompette|Trompete|trompete|トランペット|小号|ترومبيت|ट्रम्पेट
trombone|trombón|trombone|Posaune|trombone|トロンボーン|长号|ترومبون|ट्रॉम्बोन
tuba|tuba|tuba|Tuba|tuba|チューバ|大号|توبا|ट्यूबा
French horn|trompa|cor d'harmonie|Waldhorn|trompa|ホルン|圆号|هورن|फ़्रेंच हॉर्न
brass section|sección de metales|section de cuivres|Blechbläser|naipe de metais|ブラスセクション|铜管组|آلات نحاسية|ब्रास सेक्शन
alto saxophone|saxofón alto|saxophone alto|Altsaxophon|saxofone alto|アルトサックス|中音萨克斯|ساكسفون ألتو|ऑल्टो सैक्सोफ़ोन
tenor saxophone|saxofón tenor|saxophone ténor|Tenorsaxophon|saxofone tenor|テナーサックス|次中音萨克斯|ساكسفون تينور|टेनर सैक्सोफ़ोन
clarinet|clarinete|clarinette|Klarinette|clarinete|クラリネット|单簧管|كلارينيت|क्लैरिनेट
piccolo|flautín|piccolo|Piccoloflöte|flautim|ピッコロ|短笛|بيكولو|पिकोलो
flute|flauta|flûte|Flöte|flauta|フルート|长笛|فلوت|बाँसुरी
shakuhachi|shakuhachi|shakuhachi|Shakuhachi|shakuhachi|尺八|尺八|شاكوهاتشي|शाकुहाची
tin whistle|flauta irlandesa|flûte irlandaise|Tin Whistle|flauta irlandesa|ティンホイッスル|锡口笛|صفارة إيرلندية|टिन व्हिसल
square lead|sintetizador de onda cuadrada|synthé à onde carrée|Rechteck-Synthesizer|sintetizador de onda quadrada|矩形波シンセ|方波合成器|سنث بموجة مربعة|स्क्वेयर-वेव सिंथ
saw lead|sintetizador de diente de sierra|synthé en dents de scie|Sägezahn-Synthesizer|sintetizador dente de serra|ノコギリ波シンセ|锯齿波合成器|سنث بموجة سن المنشار|सॉ-वेव सिंथ
new-age pad|pad new age|nappe new age|New-Age-Fläche|pad new age|ニューエイジパッド|新世纪铺底音色|باد نيو إيج|न्यू-एज पैड
warm pad|pad cálido|nappe chaude|warme Synthesizerfläche|pad quente|ウォームパッド|温暖铺底音色|باد دافئ|वार्म पैड
halo pad|pad halo|nappe halo|Halo-Fläche|pad halo|ハローパッド|光环铺底音色|باد هالو|हेलो पैड
sweep pad|pad de barrido|nappe sweep|Sweep-Fläche|pad sweep|スウィープパッド|扫频铺底音色|باد سويب|स्वीप पैड
shamisen|shamisen|shamisen|Shamisen|shamisen|三味線|三味线|شاميسن|शामिसेन
banjo|banjo|banjo|Banjo|banjo|バンジョー|班卓琴|بانجو|बैंजो
koto|koto|koto|Koto|koto|箏|日本筝|كوتو|कोतो
bagpipes|gaita|cornemuse|Dudelsack|gaita de foles|バグパイプ|风笛|مزمار القربة|बैगपाइप
fiddle|violín folk|violon folk|Fiddle|rabeca|フィドル|民间小提琴|كمان شعبي|फ़िडल
drums|batería|batterie|Schlagzeug|bateria|ドラム|鼓|طبول|ड्रम
"""

_STYLES = """
classical piano|piano clásico|piano classique|klassische Klaviermusik|piano clássico|クラシックピアノ|古典钢琴|بيانو كلاسيكي|शास्त्रीय पियानो
baroque strings|música barroca de cuerda|musique baroque pour cordes|barocke Streichermusik|música barroca para cordas|バロック弦楽|巴洛克弦乐|وتريات باروكية|बैरोक स्ट्रिंग्स
ragtime|ragtime|ragtime|Ragtime|ragtime|ラグタイム|拉格泰姆|راغتايم|रैगटाइम
bluegrass|bluegrass|bluegrass|Bluegrass|bluegrass|ブルーグラス|蓝草音乐|بلوغراس|ब्लूग्रास
celtic|música celta|musique celtique|keltische Musik|música celta|ケルト音楽|凯尔特音乐|موسيقى سلتية|केल्टिक संगीत
swing|swing|swing|Swing|swing|スウィングジャズ|摇摆爵士|سوينغ|स्विंग जैज़
blues rock|blues rock|blues rock|Bluesrock|blues rock|ブルースロック|布鲁斯摇滚|بلوز روك|ब्लूज़ रॉक
electronic dance|música electrónica de baile|musique électronique dansante|elektronische Tanzmusik|música eletrônica de dança|ダンスミュージック|电子舞曲|موسيقى رقص إلكترونية|इलेक्ट्रॉनिक डांस
ambient|ambient|ambient|Ambient|ambient|アンビエント|氛围音乐|موسيقى أمبيانت|ऐंबिएंट
bossa nova|bossa nova|bossa nova|Bossa Nova|bossa nova|ボサノヴァ|巴萨诺瓦|بوسا نوفا|बोसा नोवा
music box|caja de música|boîte à musique|Spieldosenmusik|caixinha de música|オルゴール曲|八音盒音乐|صندوق الموسيقى|म्यूज़िक बॉक्स
brass march|marcha para banda|marche pour fanfare|Blasmusikmarsch|marcha para banda|吹奏楽マーチ|铜管进行曲|مارش نحاسي|ब्रास मार्च
koto|música de koto|musique de koto|Koto-Musik|música de koto|箏曲|日本筝曲|موسيقى الكوتو|कोतो संगीत
organ hymn|himno de órgano|cantique d'orgue|Orgelchoral|hino de órgão|オルガン讃美歌|管风琴赞美诗|ترنيمة أرغن|ऑर्गन भजन
"""


def _table(text: str) -> dict[str, dict[str, str]]:
    """language -> English word -> word."""
    out: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    for line in text.strip().splitlines():
        key, *words = line.split("|")
        if len(words) != len(LANGUAGES):
            raise ValueError(f"words for {key!r}: {len(words)} given, one for each of {LANGUAGES} is needed")
        for language, word in zip(LANGUAGES, words, strict=True):
            out[language][key] = word
    return out


INSTRUMENT_WORDS = _table(_INSTRUMENTS)
STYLE_WORDS = _table(_STYLES)

#: tonic names by language, from C upward in semitones
TONICS = {
    "es": ["do", "do#", "re", "mi bemol", "mi", "fa", "fa#", "sol", "la bemol", "la", "si bemol", "si"],
    "fr": ["do", "do dièse", "ré", "mi bémol", "mi", "fa", "fa dièse", "sol", "la bémol", "la", "si bémol", "si"],
    "pt": ["dó", "dó sustenido", "ré", "mi bemol", "mi", "fá", "fá sustenido", "sol", "lá bemol", "lá", "si bemol", "si"],
    "de": ["C", "Cis", "D", "Es", "E", "F", "Fis", "G", "As", "A", "B", "H"],
    "ja": ["ハ", "嬰ハ", "ニ", "変ホ", "ホ", "ヘ", "嬰ヘ", "ト", "変イ", "イ", "変ロ", "ロ"],
    "zh": ["C", "升C", "D", "降E", "E", "F", "升F", "G", "降A", "A", "降B", "B"],
    "ar": ["دو", "دو دييز", "ري", "مي بيمول", "مي", "فا", "فا دييز", "صول", "لا بيمول", "لا", "سي بيمول", "سي"],
    "hi": ["C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B"],
}
#: the one key that is written with a sharp where the table above has a flat
G_SHARP = {"es": "sol#", "fr": "sol dièse", "pt": "sol sustenido", "de": "Gis", "ja": "嬰ト", "zh": "升G",
           "ar": "صول دييز", "hi": "G♯"}
#: the words for (major, minor)
MODES = {
    "es": ("mayor", "menor"), "fr": ("majeur", "mineur"), "pt": ("maior", "menor"), "de": ("Dur", "Moll"),
    "ja": ("長調", "短調"), "zh": ("大调", "小调"), "ar": ("الكبير", "الصغير"), "hi": ("मेजर", "माइनर"),
}
#: the words for slow, moderate, fast
TEMPI = {
    "es": ("lento", "moderado", "rápido"), "fr": ("lent", "modéré", "rapide"), "de": ("langsam", "mäßig", "schnell"),
    "pt": ("lento", "moderado", "rápido"), "ja": ("ゆっくりした", "中くらいの", "速い"), "zh": ("慢速", "中速", "快速"),
    "ar": ("بطيء", "متوسط", "سريع"), "hi": ("धीमी", "मध्यम", "तेज़"),
}
AND = {"es": " y ", "fr": " et ", "de": " und ", "pt": " e ", "ja": "と", "zh": "和", "ar": " و", "hi": " और "}
COMMA = {"ja": "、", "zh": "、", "ar": "، "}
#: sentences; {s} style, {i} instruments, {k} key, {t} tempo word, {b} beats a minute
SENTENCES = {
    "es": ("{S} con {i}, en {k}, a {b} pulsos por minuto.", "Pieza instrumental de tempo {t} ({s}) para {i}."),
    "fr": ("{S} avec {i}, en {k}, à {b} battements par minute.", "Morceau instrumental au tempo {t} ({s}) pour {i}."),
    "de": ("{S} mit {i}, {k}, {b} Schläge pro Minute.", "Instrumentalstück ({s}), Tempo {t}, Besetzung: {i}."),
    "pt": ("{S} com {i}, em {k}, a {b} batidas por minuto.", "Peça instrumental de andamento {t} ({s}) para {i}."),
    "ja": ("{i}による{s}。{k}、毎分{b}拍。", "{t}テンポの{s}。編成は{i}。"),
    "zh": ("由{i}演奏的{s}，{k}，每分钟{b}拍。", "一首{t}的{s}，配器为{i}。"),
    "ar": ("{s} بآلات: {i}، في سلم {k}، بسرعة {b} نبضة في الدقيقة.", "مقطوعة آلية بإيقاع {t} ({s})، الآلات: {i}."),
    "hi": ("{s}: {i}, {k}, {b} बीट प्रति मिनट।", "{t} गति का वाद्य संगीत ({s}), वाद्य: {i}।"),
}

#: style -> (how English names it before a noun, and as a noun)
ENGLISH_STYLES = {
    "classical piano": ("classical piano", "classical piano music"),
    "baroque strings": ("baroque string", "baroque string music"),
    "ragtime": ("ragtime", "ragtime"), "bluegrass": ("bluegrass", "bluegrass"), "celtic": ("Celtic", "Celtic music"),
    "swing": ("swing jazz", "swing jazz"), "blues rock": ("blues rock", "blues rock"),
    "electronic dance": ("electronic dance", "electronic dance music"), "ambient": ("ambient", "ambient music"),
    "bossa nova": ("bossa nova", "bossa nova"), "music box": ("music box", "music box tune"),
    "brass march": ("brass march", "march for brass band"), "koto": ("koto", "koto music"),
    "organ hymn": ("organ hymn", "organ hymn"),
}

#: title words by style: (first words, forms)
TITLES: dict[str, tuple[str, str]] = {
    "classical piano": ("Morning,Willow,Winter,Garden,Candlelight,Letter,River,Attic,Silver,Evening",
                        "Étude,Impromptu,Bagatelle,Prelude,Album Leaf"),
    "baroque strings": ("Court,Fountain,Orangery,Terrace,Gallery,Laurel,Mirror,Summer,Palace,Autumn",
                        "Sinfonia,Ritornello,Divertimento,Intrada,Canzona"),
    "ragtime": ("Peppermint,Riverboat,Boardwalk,Lemonade,Trolley,Penny,Saloon,Bowler Hat,Nickel,Sunflower",
                "Rag,Two-Step,Cakewalk"),
    "bluegrass": ("Ridge,Possum,Sawmill,Cornbread,Hollow,Railroad,Sycamore,Whippoorwill,Creekside,Red Clay",
                  "Breakdown,Hoedown,Ramble,Reel"),
    "celtic": ("Heather,Lough,Glen,Harbour,Peat Fire,Skerry,Drover's,Foggy,Selkie,Linen",
               "Air,Jaunt,Dance,Fancy"),
    "swing": ("Midnight,Lamplight,Fifth Floor,Corner,Velvet,Taxi,Cufflink,Sidewalk,Rain Check,Late Train",
              "Stroll,Jump,Bounce,Mood"),
    "blues rock": ("Gravel Road,Diesel,Rust,Motel,Thunder,Copperhead,Two-Lane,Ashtray,Highwater,Junkyard",
                   "Blues,Shuffle,Stomp"),
    "electronic dance": ("Neon,Laser,Orbit,Voltage,Static,Prism,Chrome,Aurora,Pixel,Midnight",
                         "Drive,Signal,Pulse,Circuit"),
    "ambient": ("Snowfield,Tide,Cloud,Dusk,Glass,Meadow,Horizon,Fjord,Mist,Starlight", "Drift,Haze,Stillness,Breath"),
    "bossa nova": ("Praia,Varanda,Maré,Jasmim,Saudade,Verão,Terraço,Lua,Mangueira,Brisa", "Bossa,Balanço,Canção"),
    "music box": ("Moonbeam,Thimble,Porcelain,Pillow,Snowdrop,Carousel,Feather,Nursery,Ribbon,Firefly",
                  "Lullaby,Cradle Song,Dream"),
    "brass march": ("Parade,Regiment,Jubilee,Harbour,Summit,Banner,Fairground,Guild,Bridge,Victory", "March,Quickstep"),
    "koto": ("Maple,Crane,Snow,Bamboo,Moon,Plum,Lantern,Pine,Autumn,River", "Garden,Reflection,Verse"),
    "organ hymn": ("Chapel,Advent,Evensong,Abbey,Cloister,Harvest,Vesper,Pilgrim,Steeple,Candle",
                   "Hymn,Voluntary,Chorale"),
}
