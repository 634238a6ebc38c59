"""What is said: digit strings, spoken commands, or the phrases of a text file; in English and three Chinese languages.

A command grammar is a table of symbols, each with its alternatives; an alternative is words and ``<symbols>``. Chinese
alternatives are written with spaces between words, and said and transcribed without.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manyvoice.data.espeak import SEPARATOR
from manyvoice.errors import UsageError

GRAMMARS = ("digits", "commands", "sentences")
DIGITS: Mapping[str, Sequence[str]] = {
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
    "cmn": list("零一二三四五六七八九"),
    "yue": list("零一二三四五六七八九"),
    "hak": list("零一二三四五六七八九"),
}
_TRIES = 50_000  # a second or so: enough for one phrase in a thousand
Grammar = Mapping[str, Sequence[str]]


def _table(**symbols: str) -> dict[str, list[str]]:
    return {name: [one.strip() for one in text.split("|")] for name, text in symbols.items()}


ENGLISH_COMMANDS: Grammar = _table(
    command="""<polite> <home>|<home>|<polite> <people>|<people>|<media>|<polite> <travel>|<travel>|<shop>|<time>
        |<ask>|<health>|<nature>|<things>|<work>|<home> and <home>|<media> in the <room>""",
    polite="please|could you|would you please|can you|kindly|i want you to|go ahead and",
    home="""<switch> the <room> <device>|<switch> the <device> in the <room>|<open> the <room> <opening>
        |<switch> every <device>|set the <room> <dial> to <number> <unit>
        |<change> the <room> <dial> by <number> <unit>|make the <room> <feel>|paint the <room> lamps <colour>
        |<clean> the <room> floor""",
    switch="turn on|turn off|switch on|switch off|start|stop|pause|restart|reset|unplug|enable|disable",
    open="open|close|lock|unlock|check|shut",
    change="raise|lower|increase|reduce|boost",
    clean="vacuum|sweep|mop|polish|scrub",
    room="""kitchen|bedroom|living room|bathroom|garage|garden|hallway|office|attic|basement|nursery|dining room
        |library|laundry|cellar|balcony|porch|studio|workshop|pantry|guest room|playroom|terrace|greenhouse""",
    device="""light|lamp|fan|heater|oven|kettle|toaster|radio|television|speaker|camera|alarm|dishwasher|freezer|dryer
        |sprinkler|humidifier|projector|printer|charger|fireplace|chandelier|microwave|computer|monitor|router
        |amplifier|blender|boiler|doorbell|fountain|grill|intercom|juicer|keyboard|lantern|mixer|modem|scanner|stereo
        |stove|telephone|treadmill|turntable|ventilator|washer|shredder|laptop|tablet|purifier|jukebox""",
    opening="door|window|blinds|curtains|shutters|gate|skylight|cupboard|drawer|safe",
    dial="temperature|brightness|volume|humidity|thermostat|heating",
    unit="percent|degrees|points|steps",
    feel="warmer|cooler|brighter|darker|quieter|louder|cosier|drier",
    colour="""red|blue|green|yellow|purple|orange|white|pink|turquoise|violet|amber|crimson|golden|silver|beige|black
        |bronze|brown|grey|indigo|lavender|magenta|maroon|scarlet|copper""",
    people="""call <name>|call <name> at <place>|text <name> that <news>|send <name> a <message>
        |invite <name> to the <event>|tell <name> that <news>|remind <name> about the <event> <day>
        |forward this <message> to <name> and <name>""",
    name="""alice|robert|susan|michael|emma|oliver|charlotte|henry|grace|thomas|sophie|daniel|hannah|peter|laura
        |george|julia|martin|rachel|victor|amelia|frank|olivia|samuel|diana|walter|nora|philip|clara|edward|my mother
        |my father|my sister|my brother|my neighbour|my boss|the dentist|the plumber|the doctor|the teacher|abigail
        |adam|albert|alfred|amanda|andrew|angela|anthony|arthur|barbara|benjamin|caroline|catherine|christopher|david
        |deborah|dorothy|elizabeth|eleanor|eric|gregory|harold|helen|isabel|jacob|james|jennifer|jonathan|joseph|karen
        |leonard|louise|lucy|margaret|marcus|matthew|natalie|nicholas|patricia|rebecca|richard|rosemary|sebastian
        |simon|stephen|stella|theodore|timothy|ursula|valerie|vincent|vivian|william|winifred|zachary""",
    place="home|work|school|the hospital|the hotel|the airport|the station|the bakery",
    news="""dinner is ready|the train is late|i am on my way|the meeting is over|we need more <food>
        |the parcel has arrived|the <device> is broken|it will rain <day>|i forgot the keys|the children are asleep""",
    message="message|photograph|letter|postcard|recording|document|reminder|invitation",
    event="""party|wedding|concert|meeting|lecture|picnic|interview|rehearsal|funeral|festival|birthday|reunion
        |audition|banquet|carnival|ceremony|championship|conference|debate|election|exhibition|graduation|marathon
        |parade|seminar|tournament|auction""",
    media="""play some <genre>|play <genre> by <artist>|skip this <piece>|repeat the last <piece>
        |play the next <piece>|find a <genre> <piece>|download the <piece> from <day>
        |add this <piece> to my <list> list""",
    genre="""jazz|rock|blues|opera|folk|country|reggae|classical|ambient|electronic|gospel|disco|metal|soul|swing
        |techno|ballet|bluegrass|flamenco|grunge|polka|punk|salsa|samba|tango|waltz|choral|lullaby""",
    artist="""bach|mozart|chopin|vivaldi|ellington|armstrong|beethoven|schubert|handel|gershwin|brahms|debussy|grieg
        |haydn|liszt|mahler|puccini|purcell|rossini|sibelius|strauss|verdi|wagner""",
    piece="""song|album|track|podcast|episode|chapter|playlist|story|film|interview|sonata|symphony|trailer|ballad
        |anthem|overture""",
    list="favourite|morning|evening|workout|driving|sleeping|cooking",
    travel="""drive to the <where>|show the fastest route to the <where>|how far is the <where>|avoid the <road>
        |find a <where> near <city>|book a <ticket> to <city> <day>|when does the <vehicle> to <city> leave
        |park near the <where>""",
    where="""airport|museum|harbour|stadium|market|theatre|restaurant|pharmacy|bank|castle|zoo|university|beach|bridge
        |church|cinema|factory|forest|lighthouse|monastery|palace|village|waterfall|mountain|aquarium|arena|bakery
        |barracks|cathedral|cave|cemetery|clinic|college|courthouse|dam|embassy|farm|fairground|fortress|gallery
        |glacier|gymnasium|hospital|island|jail|lagoon|lake|marina|mill|mosque|observatory|orchard|pier|planetarium
        |playground|quarry|racecourse|ruins|shipyard|synagogue|temple|theme park|valley|vineyard|volcano|warehouse
        |windmill""",
    road="motorway|tunnel|ferry|toll road|city centre|roundabout|construction site",
    ticket="flight|room|table|taxi|seat|cabin|train ticket|ferry ticket",
    vehicle="bus|train|ferry|tram|plane|boat|coach|shuttle",
    city="""london|paris|berlin|madrid|vienna|dublin|oslo|athens|lisbon|prague|boston|chicago|denver|seattle|toronto
        |sydney|tokyo|cairo|nairobi|mumbai|singapore|edinburgh|manchester|glasgow|amsterdam|ankara|bangkok|barcelona
        |beijing|belfast|bergen|bristol|brussels|budapest|calcutta|copenhagen|dallas|florence|geneva|hamburg|hanoi
        |havana|helsinki|istanbul|jakarta|johannesburg|kingston|kyoto|lagos|lima|liverpool|marrakesh|melbourne|miami
        |montreal|moscow|munich|naples|ottawa|philadelphia|rome|santiago|shanghai|stockholm|vancouver|venice|warsaw
        |zurich""",
    shop="""add <number> <package> of <food> to the basket|buy <food> and <food>
        |order <number> <package> of <food> for <name>|remove the <food> from the shopping list
        |how much does <food> cost|we are out of <food>""",
    package="bottles|boxes|bags|cans|packets|jars|crates|pounds|cups|slices",
    food="""milk|bread|butter|cheese|rice|sugar|salt|pepper|coffee|tea|honey|apples|bananas|oranges|grapes|lemons
        |tomatoes|potatoes|carrots|onions|garlic|spinach|mushrooms|chicken|salmon|noodles|flour|yoghurt|chocolate
        |biscuits|almonds|strawberries|cucumbers|lettuce|vinegar|mustard|olives|lentils|pumpkin|cinnamon|apricots
        |asparagus|avocados|bacon|barley|basil|beans|beef|beetroot|blackberries|broccoli|cabbage|cashews|cauliflower
        |celery|cherries|chickpeas|coconuts|cranberries|cream|dates|figs|fennel|ginger|ham|hazelnuts|jam|kale|lamb
        |leeks|limes|mackerel|mangoes|melons|mint|nutmeg|oats|oregano|papaya|parsley|peaches|peanuts|pears|peas
        |pineapples|plums|pork|prawns|radishes|raisins|raspberries|saffron|sardines|sausages|sesame|shrimp|tofu|trout
        |tuna|turnips|vanilla|walnuts|zucchini""",
    time="""wake me up at <clock>|set a timer for <number> minutes|set an alarm for <clock> <day>
        |remind me to <chore> <day>|remind me to <chore> at <clock>|cancel the alarm <day>
        |postpone the <event> until <day>|what happens <day> at <clock>""",
    chore="""water the plants|feed the cat|walk the dog|pay the rent|wash the car|take my medicine|empty the bins
        |charge the phone|renew my passport|return the books|cut the grass|fix the bicycle|iron the shirts|bake a cake
        |polish my shoes|sharpen the knives|paint the fence|hang the pictures|sign the contract|sell the piano
        |visit my grandmother|finish my homework|order new glasses|clean the chimney|trim the hedge|sew the buttons
        |fold the towels|pack my suitcase|practise the violin|mend the ladder|weigh the puppy|thank my uncle
        |collect the tickets""",
    clock="<hour> o'clock|half past <hour>|quarter to <hour>|<hour> fifteen|<hour> forty five|noon|midnight",
    hour="one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve",
    number="""<hour>|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|<tens>|<tens> <unit_digit>
        |one hundred""",
    tens="twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    unit_digit="one|two|three|four|five|six|seven|eight|nine",
    day="""today|tomorrow|tonight|on monday|on tuesday|on wednesday|on thursday|on friday|on saturday|on sunday
        |next week|next month|this afternoon|in january|in march|in june|in august|in october|in december""",
    ask="""what is the weather in <city> <day>|will it <rain> <day>|what time is it in <city>|who is calling
        |how old is <name>|translate <food> into <tongue>|how do you say <colour> in <tongue>
        |what is <number> <sum> <number>|spell <where>""",
    rain="rain|snow|freeze|be sunny|be windy|be foggy|thunder",
    tongue="""french|german|spanish|italian|portuguese|russian|japanese|arabic|swedish|greek|turkish|welsh|bengali
        |czech|danish|dutch|finnish|hebrew|hindi|hungarian|korean|latin|norwegian|persian|polish|swahili|thai
        |ukrainian|vietnamese""",
    sum="plus|minus|times|divided by",
    health="""book an appointment with the <specialist> <day>|i have a <ache>|log <number> minutes of <sport>
        |how far did i <move> <day>|how many calories are in <food>|when does the <sport> start""",
    specialist="cardiologist|dermatologist|optician|surgeon|midwife|nurse|pharmacist|psychiatrist|veterinarian",
    ache="headache|fever|cough|toothache|rash|blister|migraine|sprained ankle|sore throat",
    sport="""archery|badminton|baseball|basketball|boxing|climbing|cricket|fencing|football|golf|gymnastics|handball
        |hockey|judo|karate|lacrosse|rowing|rugby|sailing|skating|skiing|snooker|squash|surfing|swimming|tennis
        |volleyball|wrestling|yoga""",
    move="run|walk|swim|cycle|jog",
    nature="""show me a picture of the <animal>|how fast is the <animal>|what sound does the <animal> make
        |where does the <animal> live|which is heavier the <animal> or the <animal>""",
    animal="""alligator|badger|beaver|buffalo|camel|cheetah|chimpanzee|cobra|crocodile|dolphin|donkey|eagle|elephant
        |falcon|flamingo|fox|frog|gazelle|giraffe|gorilla|hamster|hawk|hedgehog|heron|hippopotamus|jaguar|kangaroo
        |koala|leopard|lion|lizard|lobster|meerkat|monkey|moose|octopus|ostrich|otter|owl|panda|parrot|peacock|pelican
        |penguin|porcupine|rabbit|raccoon|reindeer|rhinoceros|scorpion|seal|shark|sparrow|squirrel|swan|tiger|tortoise
        |turtle|vulture|walrus|weasel|whale|wolf|woodpecker|zebra""",
    things="""find my <garment>|order a <colour> <garment> for <name>|where is the <tool>|how do i use a <tool>
        |put the <tool> and the <tool> on my <list> list""",
    garment="""apron|belt|blouse|boots|bracelet|cardigan|coat|dress|earrings|gloves|hat|helmet|jacket|jeans|jumper
        |necklace|pyjamas|raincoat|sandals|scarf|skirt|slippers|socks|sunglasses|sweater|tie|trousers|umbrella|uniform
        |wallet""",
    tool="""axe|bucket|chisel|compass|crowbar|drill|hammer|hose|ladder|microscope|needle|paintbrush|pliers|pulley|rake
        |ruler|saw|scissors|screwdriver|shovel|spanner|stapler|tape|telescope|toothbrush|torch|tweezers|wheelbarrow
        |wrench""",
    work="what does a <job> earn|find me a <job> near <city>|i want to become a <job>|ask the <job> about the <event>",
    job="""accountant|architect|astronaut|baker|barber|butcher|carpenter|electrician|engineer|farmer|firefighter
        |florist|gardener|journalist|judge|lawyer|librarian|mechanic|musician|painter|photographer|pilot|postman
        |sailor|scientist|sculptor|secretary|tailor|translator|waiter|welder""",
)

_CHINESE_NUMBER = {
    "number": ["<unit>", "十", "十 <unit>", "<tens> 十", "<tens> 十 <unit>"],
    "unit": list("一二三四五六七八九"),
    "tens": list("二三四五六七八九"),
    "hour": [*"一三四五六七八九十", "十 一", "十 二"],
}
MANDARIN_COMMANDS: Grammar = _CHINESE_NUMBER | _table(
    command="<home>|请 <home>|<people>|请 <people>|<media>|<time>|<travel>|<shop>",
    home="""<switch> <room> 的 <device>|把 <room> 的 <device> <switch>|把 <room> 的 温度 调到 <number> 度
        |<room> 的 声音 <louder>
        |把 <room> 的 灯 调成 <colour>|打扫 <room>""",
    switch="打开|关闭|启动|停止|检查",
    room="客厅|厨房|卧室|书房|浴室|车库|花园|办公室|阳台|餐厅|门口|楼上|楼下|儿童房",
    device="灯|电视|空调|风扇|电脑|音响|窗户|窗帘|冰箱|洗衣机|热水器|收音机|摄像头|门",
    louder="大 一点|小 一点|高 一点|低 一点",
    colour="红色|蓝色|绿色|黄色|白色|紫色",
    people="打电话 给 <name>|告诉 <name> <news>|发 信息 给 <name>|<day> 提醒 <name> <chore>",
    name="妈妈|爸爸|爷爷|奶奶|哥哥|姐姐|弟弟|妹妹|老师|医生|王先生|李小姐|张经理|同事|邻居|朋友",
    news="我 在 路上|晚饭 好 了|会议 结束 了|火车 晚点 了|<day> 会 下雨|我们 需要 <food>",
    media="播放 <genre>|我 想 听 <genre>|下一首|上一首|暂停 <genre>|在 <room> 播放 <genre>",
    genre="音乐|新闻|古典音乐|流行歌曲|天气预报|故事|电影|相声|京剧",
    time="""<day> <hour> 点 叫 我 起床|<day> <hour> 点 提醒 我 <chore>|<number> 分钟 后 提醒 我 <chore>|现在 几点
        |取消 <day> 的 闹钟""",
    day="今天|明天|后天|星期一|星期二|星期三|星期五|周末|今天晚上|明天早上|下个月",
    chore="吃药|开会|买菜|浇花|交房租|洗车|接孩子|做饭|运动|写作业",
    travel="带 我 去 <place>|去 <place> 怎么 走|<day> <city> 的 天气 怎么样|订 一张 去 <city> 的 <ticket>",
    place="机场|火车站|医院|学校|超市|图书馆|公园|银行|博物馆|饭店|邮局",
    city="北京|上海|广州|深圳|成都|杭州|南京|西安|武汉|重庆|天津",
    ticket="机票|火车票|车票",
    shop="买 <number> 斤 <food>|我 要 <number> 瓶 <drink>|把 <food> 加到 购物单",
    food="苹果|香蕉|米饭|牛肉|鸡肉|白菜|土豆|西红柿|鸡蛋|豆腐|面条|葡萄",
    drink="牛奶|啤酒|可乐|果汁|矿泉水",
)
CANTONESE_COMMANDS: Grammar = _CHINESE_NUMBER | _table(
    command="<home>|唔該 <home>|<people>|唔該 <people>|<media>|<time>|<travel>|<shop>",
    home="""<switch> <room> 嘅 <device>|將 <room> 嘅 溫度 調到 <number> 度|<room> 嘅 聲音 <louder>
        |將 <room> 嘅 燈 轉做 <colour>
        |打掃 <room>""",
    switch="打開|關閉|開|熄|檢查",
    room="客廳|廚房|睡房|書房|浴室|車房|花園|辦公室|露台|飯廳|門口|樓上|樓下",
    device="燈|電視|冷氣|風扇|電腦|音響|窗|窗簾|雪櫃|洗衣機|熱水爐|收音機|門",
    louder="大聲 啲|細聲 啲|高 啲|低 啲",
    colour="紅色|藍色|綠色|黃色|白色|紫色",
    people="打電話 畀 <name>|話 畀 <name> 知 <news>|發 訊息 畀 <name>|<day> 提 <name> <chore>",
    name="媽媽|爸爸|爺爺|婆婆|哥哥|家姐|細佬|妹妹|老師|醫生|陳先生|李小姐|經理|同事|鄰居|朋友",
    news="我 喺 路上|飯 煮好 喇|開完會 喇|火車 遲到|<day> 會 落雨|我哋 要 <food>",
    media="播放 <genre>|我 想 聽 <genre>|下一首|上一首|暫停 <genre>|喺 <room> 播放 <genre>",
    genre="音樂|新聞|古典音樂|流行歌|天氣報告|故事|電影|粵劇",
    time="""<day> <hour> 點 叫 我 起身|<day> <hour> 點 提 我 <chore>|<number> 分鐘 後 提 我 <chore>|而家 幾點
        |取消 <day> 嘅 鬧鐘""",
    day="今日|聽日|後日|星期一|星期二|星期三|星期五|週末|今晚|聽朝|下個月",
    chore="食藥|開會|買餸|淋花|交租|洗車|接細路|煮飯|做運動|做功課",
    travel="帶 我 去 <place>|點樣 去 <place>|<day> <city> 天氣 點樣|訂 一張 去 <city> 嘅 <ticket>",
    place="機場|火車站|醫院|學校|超級市場|圖書館|公園|銀行|博物館|酒樓|郵局",
    city="香港|九龍|沙田|大埔|元朗|澳門|廣州|深圳|台北|北京",
    ticket="機票|火車飛|船飛",
    shop="買 <number> 斤 <food>|我 要 <number> 樽 <drink>",
    food="蘋果|香蕉|米|牛肉|雞肉|白菜|薯仔|番茄|雞蛋|豆腐|麵|提子",
    drink="牛奶|啤酒|可樂|果汁|水",
)
HAKKA_COMMANDS: Grammar = _CHINESE_NUMBER | _table(
    command="<home>|請 <home>|<people>|<time>|<travel>|<shop>",
    home="<room> 个 <device> 愛 <state>|開 <room> 个 <device>|洗 <room> 个 <device>|<room> 愛 <number> 度",
    state="開|停|大聲|細聲|高|低",
    room="客廳|灶下|廚房|間房|房間|洗身間|便所|花園|書房|車庫|屋背|門口|禾埕|餐廳",
    device="電火|燈|電視|電扇|冰箱|收音機|窗門|門|電話|機器|眠床|桌仔",
    people="打 電話 分 <name>|請 <name> 來 <place>|<day> <chore> 同 <name>",
    name="阿爸|阿姆|阿公|阿婆|阿哥|阿姊|老妹|老弟|阿叔|阿伯|阿舅|阿嫂|先生|朋友|頭家|鄰舍",
    time="<day> <period> <hour> 點 <chore>|<hour> 點 半 <chore>|<day> 个 天時|<day> <period> 落雨",
    day="今晡日|天光日|昨晡日|後日",
    period="朝晨|當晝|下晝|暗晡|半夜",
    chore="食飯|食茶|煮飯|洗衫|洗身|睡目|行路|運動|上課|出門",
    travel="去 <place>|<place> 个 路|<day> <period> 去 <place> <chore>",
    place="學校|公園|銀行|市場|圖書館|餐廳|車頭|廟|老屋|屋下",
    shop="買 <number> 斤 <food>|買 <food> 同 <food>|<food> <number> 斤",
    food="米|魚|雞|鴨|豬肉|豆腐|弓蕉|柑仔|番豆|番薯|蘿蔔|鹽|糖|油|茶|酒|米粉|卵",
)
COMMANDS: Mapping[str, Grammar] = {
    "en": ENGLISH_COMMANDS,
    "cmn": MANDARIN_COMMANDS,
    "yue": CANTONESE_COMMANDS,
    "hak": HAKKA_COMMANDS,
}

#: espeak-ng's Hakka reads a romanisation, no characters: here are the readings of the words above (Sixian, as in the
#: dictionary of frequent Hakka words of Taiwan's Ministry of Education), in espeak-ng's phoneme names, tones 1 to 6.
_READINGS = """
    一 it5|七 tS;hit5|三 sam1|上課 soN4 kho4|下晝 ha1 tsu4|个 ke4|九 kiu3|二 n^i4|五 N-3
    |今晡日 kim1 pu1 n^it5|低 tai1|來 loi2|便所 phien4 so3|停 thin2|先生 S;in1 saN1|八 pat5|公園 kuN1 ien2
    |六 liuk5|冰箱 pen1 S;ioN1|出門 tshut5 mun2|分 pun1|十 si.p6|半 pan4|半夜 pan4 ia4|卵 lon3|去 hi4
    |同 thuN2|四 S;i4|圖書館 thu2 su1 kon3|大聲 thai4 saN1|天光日 thien1 koN1 n^it5|天時 thien1 si.2
    |學校 hok6 kau3|客廳 hak5 thaN1|屋下 vuk5 ha1|屋背 vuk5 poi4|市場 si.4 tshoN2|度 thu4|廚房 tshu2 foN2
    |廟 meu4|弓蕉 kiuN1 tseu1|後日 heu1 n^it5|愛 oi4|房間 foN2 kien1|打 ta3|收音機 su1 im1 ki1|斤 kin1
    |昨晡日 tsho1 pu1 n^it5|暗晡 am4 pu1|書房 su1 foN2|朋友 phen2 iu1|朝晨 tseu1 si.n2|柑仔 kam1 e3
    |桌仔 tsok5 e3|機器 ki1 hi4|油 iu2|洗 se3|洗衫 se3 sam1|洗身 se3 si.n1|洗身間 se3 si.n1 kien1
    |灶下 tso4 ha1|煮飯 tsu3 fan4|燈 ten1|番薯 fan1 su2|番豆 fan1 theu4|當晝 toN1 tsu4|眠床 min2 tshoN2
    |睡目 soi4 muk5|禾埕 vo2 thaN2|窗門 tshuN1 mun2|米 mi3|米粉 mi3 fun3|糖 thoN2|細聲 se4 saN1|老妹 lo3 moi4
    |老屋 lo3 vuk5|老弟 lo3 thai1|花園 fa1 ien2|茶 tsha2|落雨 lok6 i3|蘿蔔 lo2 phet6|行路 haN2 lu4
    |請 tS;hiaN3|豆腐 theu4 fu4|豬肉 tsu1 n^iuk5|買 mai1|路 lu4|車庫 tsha1 khu4|車頭 tsha1 theu2
    |運動 iun4 thuN4|鄰舍 lin2 sa4|酒 tS;iu3|銀行 n^iun2 hoN2|門 mun2|門口 mun2 heu3|開 khoi1
    |間房 kien1 foN2|阿伯 a1 pak5|阿公 a1 kuN1|阿叔 a1 suk5|阿哥 a1 ko1|阿姆 a1 me1|阿姊 a1 tS;i3|阿婆 a1 pho2
    |阿嫂 a1 so3|阿爸 a1 pa1|阿舅 a1 khiu1|雞 kie1|零 laN2|電扇 thien4 san4|電火 thien4 fo3|電視 thien4 si.4
    |電話 thien4 fa4|頭家 theu2 ka1|食茶 si.t6 tsha2|食飯 si.t6 fan4|餐廳 tshon1 thaN1|高 ko1|魚 N-2|鴨 ap5
    |鹽 iam2|點 tiam3
"""
HAKKA: Mapping[str, str] = dict(one.strip().split(maxsplit=1) for one in _READINGS.split("|"))


@dataclass(frozen=True)
class Phrase:
    """What is said and written; and its phonemes, as ``Engine.phonemes`` writes them, if espeak-ng cannot read it."""

    text: str
    phonemes: str | None = None


def length(text: str, language: str) -> int:
    """Words, or characters in Chinese."""
    return len(text.split()) if language == "en" else len(re.sub(r"\s", "", text))


def combinations(grammar: Grammar, symbol: str = "command") -> int:
    """How many ways a symbol can be expanded."""
    total = 0
    for alternative in grammar[symbol]:
        ways = 1
        for name in re.findall(r"<(\w+)>", alternative):
            ways *= combinations(grammar, name)
        total += ways
    return total


def vocabulary(grammar: Grammar) -> frozenset[str]:
    """All words of a grammar."""
    return frozenset(
        word for alternatives in grammar.values() for one in alternatives for word in re.sub(r"<\w+>", " ", one).split()
    )


def expand(grammar: Grammar, rng: random.Random, symbol: str = "command") -> list[str]:
    """Words of one sentence, every alternative of a symbol equally likely."""
    words: list[str] = []
    for token in rng.choice(grammar[symbol]).split():
        words += expand(grammar, rng, token[1:-1]) if token.startswith("<") else [token]
    return words


def read_sentences(path: Path, language: str, words: tuple[int, int], most_frequent: int | None = None) -> list[str]:
    """Distinct phrases of a text file, one a line, of ``words[0]`` to ``words[1]`` words.

    Args: most_frequent: keep phrases made of the N most frequent words of the file only.
    Raises: UsageError if the file cannot be read or no phrase is left.
    """
    try:
        lines = [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"text = {str(path)!r}: cannot be read as UTF-8 text, one phrase a line: {error}") from error
    split = str.split if language == "en" else (lambda line: list(line.replace(" ", "")))
    counts = Counter(word for line in lines for word in split(line))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    known = set(ranked[:most_frequent])
    kept = [line for line in dict.fromkeys(lines) if words[0] <= length(line, language) <= words[1]]
    kept = [line for line in kept if known.issuperset(split(line))]
    if not kept:
        raise UsageError(
            f"text = {str(path)!r}: no phrase has {words[0]} to {words[1]} words within vocabulary ="
            f" {most_frequent}; widen either"
        )
    return kept


def share_of(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the phrase and the seed alone: splits are ranges of it."""
    digest = hashlib.sha256(f"{seed}/{' '.join(text.lower().split())}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


@dataclass(frozen=True, kw_only=True)
class PhraseSource:
    """An endless stream of phrases of one language.

    Args: words: shortest and longest, in words or Chinese characters.  sentences: for the grammar of that name.
        part: phrases whose ``share_of`` lies in [low, high) only.
    """

    grammar: str
    language: str
    words: tuple[int, int]
    sentences: Sequence[str] = ()
    part: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    def stream(self, rng: random.Random) -> Iterator[Phrase]:
        """Sentences come in a new order each time round; digits and commands are drawn, and may come again.

        Raises: UsageError if no phrase fits.
        """
        return self._cycle(rng) if self.grammar == "sentences" else self._draw(rng)

    def _cycle(self, rng: random.Random) -> Iterator[Phrase]:
        lines = [line for line in self.sentences if self._inside(line)]
        if not lines:
            raise self._nothing()
        while True:
            rng.shuffle(lines)
            yield from map(Phrase, lines)

    def _draw(self, rng: random.Random) -> Iterator[Phrase]:
        while True:
            for _ in range(_TRIES):
                words = self._words(rng)
                text = (" " if self.language == "en" else "").join(words)
                if self.words[0] <= length(text, self.language) <= self.words[1] and self._inside(text):
                    yield Phrase(text, hakka_phonemes(words) if self.language == "hak" else None)
                    break
            else:
                raise self._nothing()

    def _words(self, rng: random.Random) -> list[str]:
        if self.grammar == "digits":
            return rng.choices(DIGITS[self.language], k=rng.randint(*self.words))
        return expand(COMMANDS[self.language], rng)

    def _inside(self, text: str) -> bool:
        return self.part == (0.0, 1.0) or self.part[0] <= share_of(text, self.seed) < self.part[1]

    def _nothing(self) -> UsageError:
        return UsageError(
            f"words = {self.words}: grammar {self.grammar!r} in {self.language!r} has no such phrase in the part"
            f" {self.part[0]:.3f} to {self.part[1]:.3f} of its phrases; widen words, or make the split larger"
        )


def hakka_phonemes(words: Sequence[str]) -> str:
    """Phonemes of Hakka words, as ``Engine.phonemes`` would write them.

    Raises: UsageError for a word whose reading is not known.
    """
    unknown = [word for word in words if word not in HAKKA]
    if unknown:
        raise UsageError(f"text: no Hakka reading for {', '.join(unknown)}; Hakka speaks digits and commands only")
    syllables = [syllable for word in words for syllable in HAKKA[word].split()]
    return " ".join(_HAKKA_ONSET.sub(rf"\g<0>{SEPARATOR}", syllable) for syllable in syllables)


_HAKKA_ONSET = re.compile(r"^(?:tS;h?|tsh?|[ptk]h|n\^|S;|[ptkmnNfvlhs])(?![-0-9])")
