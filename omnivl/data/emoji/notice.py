"""Licences that are shipped with the data."""

MIT_TEXT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

NOTICE = f"""\
The pictures, clips and names in this folder come from the packages below. Pictures were scaled, rasterised and
re-encoded; animations were scaled, cut to a few frames and re-encoded; names, tags and groups were joined by code
points. Each sample's JSON names the licence of its picture.

Style "fluent", drawings and clips: Microsoft Fluent Emoji. Copyright (c) Microsoft Corporation. MIT licence.
  From npm @lobehub/fluent-emoji-3d 1.1.0 and @lobehub/fluent-emoji-anim-1 to -4 1.0.0, Copyright (c) LobeHub, MIT
  licence (package.json).
Style "noto": Noto Emoji. Copyright Google LLC. Apache License 2.0, http://www.apache.org/licenses/LICENSE-2.0 (full
  text in the project's LICENSE).
  From npm emoji-datasource-google 16.0.0, Copyright (c) 2013 Cal Henderson, MIT licence.
Style "twemoji": Twemoji. Copyright 2014-2021 Twitter, Inc and other contributors, 2022-present Jason Sofonia and
  Justine De Caires. Graphics: CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/. Rasterised and scaled.
  From npm @discordapp/twemoji 16.0.1, code under the MIT licence.
Style "noto_v1": Noto Emoji, first design. Copyright Google LLC. Apache License 2.0. Rasterised and scaled.
  From npm @iconify-json/noto-v1 1.2.5.
Style "emojione_v2": Emoji One 2, now EmojiTwo. Copyright Emoji One and the EmojiTwo contributors. CC-BY-4.0,
  https://creativecommons.org/licenses/by/4.0/. Rasterised and scaled. From npm @iconify-json/emojione 1.2.3.
Style "fluent_flat": Microsoft Fluent Emoji, flat design. Copyright (c) Microsoft Corporation. MIT licence. Rasterised
  and scaled. From npm @iconify-json/fluent-emoji-flat 1.2.6.
Style "fxemoji": Firefox OS Emoji. Copyright Mozilla Foundation. Apache License 2.0. Rasterised and scaled.
  From npm @iconify-json/fxemoji 1.2.2.
Style "streamline": Streamline Emojis. Copyright Streamline. CC-BY-4.0, https://creativecommons.org/licenses/by/4.0/.
  Rasterised and scaled. From npm @iconify-json/streamline-emojis 1.2.4.
Names, tags, groups and subgroups: npm emojibase-data 17.0.0. Copyright (c) 2017-2019 Miles Johnson. MIT licence.

MIT licence

{MIT_TEXT}"""
