"""Tests of reward.py: labelled answers, input that must not slow it down, and arithmetic against an exact oracle.

Random hostile text is in test_hostile.py."""

import random
import sys
import time
from fractions import Fraction

import reward
from reward import extract_answer, is_equivalent, math_reward

EQUAL = [
    (r"\frac12", "1/2"), (r"\frac12", "0.5"), (r"\frac12", ".5"), (r"\dfrac{1}{2}", r"\tfrac12"),
    (r"\cfrac{3}{4}", "0.75"), (r"\frac 59", "5/9"), (r"\frac9{19}", "9/19"),
    (r"\frac{270}7\text{ degrees}", "270/7"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"), (r"\frac{14}{3}", "14/3"),
    (r"\frac{14}{3}", r"4\frac{2}{3}"), (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    (r"\frac{1}{-2}", "-0.5"), (r"-\frac{35}{9}", "-35/9"), (r"\frac{4}{6}", r"\frac{2}{3}"),
    (r"\frac{\frac{1}{2}}{3}", "1/6"), (r"\frac\pi2", r"\frac{\pi}{2}"),
    (r"\frac{\pi}{2}", r"0.5\pi"), (r"\frac{\pi}{2}", r"\pi/2"), (r"\frac{\pi}{2}", "pi/2"),
    (r"\frac{\pi}{2}", "π/2"), ("1,000", "1000"), ("1{,}000", "1000"), (r"1\,000", "1000"),
    ("1 000", "1000"), (r"1\!,000", "1000"), (r"1,\!000", "1000"), (r"10,\!080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"), (r"11,\! 111,\! 111,\! 100", "11,111,111,100"),
    ("58,500", "58500"), (r"\$32,\!348", "32348"), (r"\$32,348", "32348"),
    (r"\$32,348", "32,348"), (r"\$18.90", "18.9"), (r"\$18.90", "18.90"),
    (r"\$36", r"36 \text{ dollars}"), ("1,234.5", "1234.5"), ("5.", "5"), ("$5$", "5"),
    (r"\(5\)", "5"), (r"\[5\]", "5"), ("$$5$$", "5"), ("$5.$", "5"), (r"\text{5}", "5"),
    (r"\mathrm{5}", "5"), (r"\mbox{5}", "5"), (r"\textbf{5}", "5"), ("{5}", "5"), ("(5)", "5"),
    (r"\left(5\right)", "5"), ("+5", "5"), ("--5", "5"), ("-(-5)", "5"), (r"5\!", "5"),
    (r"\;5\:", "5"), ("~5", "5"), (r"5\quad", "5"), (r"\displaystyle\frac{1}{2}", "1/2"),
    (r"864 \mbox{ inches}^2", "864"), (r"864 \mbox{ inches}^2", r"864 \text{ square inches}"),
    (r"15\mbox{ cm}^2", "15"), (r"15\mbox{ cm}^2", "15 cm^2"), ("15 cm", "15"),
    (r"5 \text{ cm}^2", "5"), (r"5 \text{ meters}", "5"), ("5 meters", "5"),
    (r"5\ \text{m}", "5"), (r"5 \mathrm{~m}", "5"), (r"5 \mathrm{~m/s}", "5"),
    (r"5 \text{ m/s}", r"5 \text{ meters per second}"), (r"5.4 \text{ cents}", "5.4"),
    (r"12 \text{ apples}", "12"), (r"90^\circ", "90"), (r"90^{\circ}", "90"),
    (r"90^\circ", "90 degrees"), (r"90^\circ", r"90\text{ degrees}"), (r"90\degree", "90"),
    ("90°", "90"), (r"\frac{\pi}{3} \text{ radians}", r"\frac{\pi}{3}"), (r"145^\circ", "145"),
    (r"50\%", "50"), ("50%", "50"), (r"50\%", "50%"), (r"8 \%", "8"), ("62.5%", r"62.5\%"),
    (r"17.5\%", "17.5"), ("x=5", "5"), ("x = 5", "x=5"), ("5", "n=5"), ("k=3", "3"),
    ("f(x)=2x", "2x"), ("f(x)=2 x", "f(x)=2x"), ("f(x)=x+1", "f(x) = 1+x"), ("f(x)=x+1", "x+1"),
    (r"x \in [-2,7]", "[-2,7]"), (r"x \in [-2,7]", r"x\in\left[-2,7\right]"),
    (r"M=\frac{9}{32} \sqrt{2}", r"\frac{9\sqrt{2}}{32}"), (r"m_{\max }=n^{2}-n-1", "n^2-n-1"),
    (r"N(n)=\left\lfloor\frac{2 n}{3}\right\rfloor+1", r"\lfloor 2n/3 \rfloor + 1"),
    ("P(A)=1/2", "0.5"), ("y = 2x + 3", "y=3+2x"), ("y = 2x+3", "y - 2x = 3"),
    ("y = 2x+3", "2x+3"), ("y = 2x+3", "2x+3=y"),
    ("5x - 7y + 11z + 4 = 0", "4 + 5x - 7y + 11z = 0"), ("5x - 7y + 11z + 4 = 0", "5x-7y+11z=-4"),
    ("y=-2x", "y = -2 x"), ("x^2+y^2=4", "y^2 + x^2 = 4"), ("x>2", "2<x"),
    (r"x \geq 2", r"2 \leq x"), (r"x \ge 2", r"x \geq 2"), (r"x \geqslant 2", "x>=2"),
    (r"k \geqslant 2", r"k \ge 2"), ("1<x<2", "2>x>1"), (r"1 \le x < 2", r"1\leq x<2"),
    ("x≥2", r"x \ge 2"), (r"x \neq 2", r"x \ne 2"), (r"1\frac12", "3/2"),
    (r"1\frac{4}{5}", "9/5"), (r"1\frac{4}{5}", "1.8"), (r"1 \frac{4}{5}", "1 4/5"),
    (r"137 \frac{1}{2}", "137.5"), (r"137 \frac{1}{2}", r"\frac{275}{2}"), (r"-1\frac12", "-1.5"),
    ("1 1/2", "1.5"), (r"2\frac{1}{2}", "2.5"), ("5.3e-9", r"5.3 \times 10^{-9}"),
    ("5.3e-9", r"5.3 \cdot 10^{-9}"), ("4.5e33", r"4.5 \times 10^{33}"),
    ("4.5e33", r"4.5\times10^{33} \text{ ergs}"), ("3e8", r"3 \times 10^8"), ("3e8", "300000000"),
    ("3E8", "3e8"), (".0000672", r"6.72 \times 10^{-5}"), (".0000672", "0.0000672"),
    ("1e-5", "0.00001"), ("-1./3", r"-\frac13"), ("-3./2", "-1.5"), (r"2 \cdot 3", "6"),
    (r"2 \times 3", "6"), (r"6 \div 3", "2"), ("6÷3", "2"), ("2×3", "6"), ("2*3", "6"),
    ("1,2", "1, 2"), ("1,2", "2,1"), ("1,2", r"\{1,2\}"), (r"\{1,2\}", r"\{2,1\}"),
    (r"\{1, 2\}", r"\left\{2, 1\right\}"), (r"\{1,2\}", r"\lbrace 1,2\rbrace"),
    ("1,2", "1 and 2"), ("1, 2", r"1 \text{ and } 2"), ("1,2", "1 or 2"),
    ("1, 2, 3", "1, 2, and 3"), ("1,2", "x=1, x=2"), ("1,2", r"x=1 \text{ or } x=2"),
    ("1,-2", "-2,1"), ("-2,1", "1,-2"), ("3, 5, 7", "3,5,7"), ("3, 5, 7", "7,5,3"),
    ("100,200,300", "100, 200, 300"), ("100,200,300", "300, 200, 100"),
    ("100,200,300", r"\{100,200,300\}"), ("100,200,300", "100,200,300"),
    ("27,54,108,135,189,216,270,297,351,378", "378, 351, 297, 270, 216, 189, 135, 108, 54, 27"),
    ("27,54,108,135,189,216,270,297,351,378", "378,351,297,270,216,189,135,108,54,27"),
    ("$69$,$84$", "84, 69"), ("2500,7500", "7500,2500"),
    ("(1,8,19), (2,7,13), (4,5,7)", "(4,5,7),(1,8,19),(2,7,13)"),
    ("(2,32), (8,18)", "(8,18) and (2,32)"), ("$(1,1), (3,2)$", "(1,1),(3,2)"),
    (r"1\pm\sqrt{5}", r"1+\sqrt5, 1-\sqrt5"), (r"1 \pm \sqrt{19}", r"1 - \sqrt{19}, 1+\sqrt{19}"),
    (r"1 \pm \sqrt{19}", r"x = 1 \pm \sqrt{19}"), (r"3 \pm 2 \sqrt{2}", r"3+2\sqrt2,3-2\sqrt2"),
    (r"3 \pm 2 \sqrt{2}", r"3 \mp 2\sqrt{2}"), (r"\pm 2", "2, -2"), (r"\pm 2", r"\{-2,2\}"),
    ("±2", r"\pm2"), (r"\{1\pm\sqrt{5},-2\}", r"\{1+\sqrt5, 1-\sqrt5, -2\}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt{5}, 1+\sqrt{5}"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"), ("(x,y)=(1,2)", "(1,2)"),
    ("(6,31,-1)", "(6, 31, -1)"),
    (r"(22+8 \sqrt{6}, 22-8 \sqrt{6})", r"(22+\sqrt{384},22-8\sqrt6)"),
    (r"\langle 1,2 \rangle", r"\langle 1, 2\rangle"), ("[2,5)", r"\left[2,5\right)"),
    ("[2,5)", "[2, 5)"), (r"(-\infty,-1]\cup[1,\infty)", r"[1,\infty) \cup (-\infty,-1]"),
    (r"(-\infty,-1]\cup[1,\infty)", "(-∞,-1]∪[1,∞)"),
    (r"(-\infty,-1]\cup[1,\infty)", r"(-\infty,-1] \cup [1,+\infty)"),
    (r"(-\infty, 2) \cup (3, \infty)", r"x \in (-\infty, 2) \cup (3, \infty)"),
    (r"(-\infty, 0) \cup\{1\}", r"\{1\}\cup(-\infty,0)"),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(3/5, 8/3]"),
    (r"(-\sqrt{3}, \sqrt{3})", r"(-\sqrt3,\sqrt3)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left(\begin{array}{c}1\\2\end{array}\right)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
     r"\begin{pmatrix} -\frac13 \\ \frac23 \\ \frac{5}{3} \end{pmatrix}"),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
     r"\begin{bmatrix}-1&0\\0&-1\\\end{bmatrix}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"),
    (r"\text{Evelyn}", "evelyn"), (r"\text{Evelyn}", "Evelyn"),
    (r"\text{Evelyn}", r"\mathrm{Evelyn}"), (r"\text{Evelyn}", r"\textbf{Evelyn}"),
    (r"\text{east}", "East"), (r"\text{even}", "even"), (r"\text{Yes}", "yes"),
    (r"\text{No}", "no"), (r"\text{Sam}", "Sam"), (r"\text{True}", "true"), (r"\text{(C)}", "C"),
    (r"\text{(C)}", "(C)"), (r"\text{(C)}", r"\text{C}"), (r"\text{(E)}", "E"),
    (r"\textbf{(C)}", "C"), ("C", r"\textbf{C}"), (r"\text{ellipse}", "ellipse"),
    (r"\text{odd function}", "odd function"), (r"\infty", r"+\infty"), (r"\infty", "∞"),
    (r"-\infty", r"- \infty"), (r"\varnothing", r"\emptyset"), (r"\emptyset", r"\{\}"),
    ("12_5", "12_{5}"), ("52_8", "52_{8}"), ("4210_{5}", "4210_5"), ("2^{10}", "1024"),
    ("2^10", "1024"), ("2^{10}", "2^{{10}}"), ("x^2", "x^{2}"), ("x²", "x^2"), ("x^{10}", "x^10"),
    (r"\sqrt[3]{x}", "x^{1/3}"), (r"\sqrt[3]{8}", "2"), (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
    (r"\frac{8}{\sqrt[3]{7}}", r"\frac{8 \sqrt[3]{49}}{7}"),
    (r"5 \sqrt[3]{4}", r"5\cdot 4^{1/3}"), (r"\sqrt[3]{-8}", "-2"), (r"\binom{5}{2}", "10"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{(n!)^2}"), (r"\dbinom{5}{2}", "10"), ("5!", "120"),
    (r"\frac{100!}{2^{50}}", r"100! \cdot 2^{-50}"), (r"\log_2 8", "3"), (r"\log_{10} 100", "2"),
    (r"\log 100", "2"), (r"\ln e", "1"), (r"\ln 8", r"3\ln 2"), (r"\sin(\pi/6)", "1/2"),
    (r"\sin\frac{\pi}{6}", "0.5"), (r"\cos(0)", "1"), (r"\tan^{-1}(1)", r"\pi/4"),
    (r"\arctan 1", r"\frac{\pi}{4}"), (r"\cos^2 x", r"(\cos x)^2"), (r"\sin^2 x+\cos^2 x", "1"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"), (r"\sin 2x", r"2\sin x\cos x"), (r"e^{i\pi}", "-1"),
    ("e^2", r"e \cdot e"), ("e^{-t}", r"\frac{1}{e^t}"), ("e^{t} / 3", r"\frac{e^t}{3}"),
    (r"\exp(2)", "e^2"), ("|{-5}|", "5"), ("|-5|", "5"), ("|x|", r"\sqrt{x^2}"),
    (r"\lfloor 3.7 \rfloor", "3"), (r"\lceil 3.2 \rceil", "4"),
    (r"\left\lfloor\log _{2} n\right\rfloor+1", r"1+\lfloor \log_2 n \rfloor"),
    (r"m n-\lfloor m / 2\rfloor", r"mn - \left\lfloor \frac{m}{2} \right\rfloor"),
    ("2x", r"2 \cdot x"), ("2x", r"x\cdot 2"), ("2(x+1)", "2x+2"), (r"x\sqrt{2}", r"\sqrt2 x"),
    ("(x+1)^2", "x^2+2x+1"), ("(a+5)(b+2)", "ab+2a+5b+10"), ("(a+5)(b+2)", "(b+2)(a+5)"),
    (r"\sqrt{8}", r"2\sqrt2"), (r"11\sqrt2", r"11\sqrt{2}"), (r"11\sqrt2", r"\sqrt{242}"),
    (r"11\sqrt2", "11√2"), (r"\frac{1}{\sqrt2}", r"\frac{\sqrt2}{2}"),
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"), (r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac34}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"3\sqrt{13}", r"\sqrt{117}"),
    (r"70 \sqrt{2}", r"70\sqrt2"), ("sqrt(2)", r"\sqrt{2}"), (r"2\sqrt(3)", r"2\sqrt{3}"),
    (r"11 \sqrt{5} + 11", r"11(1+\sqrt5)"), (r"\sqrt{2}-1", r"\frac{1}{1+\sqrt2}"),
    (r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3"), ("6 - 5i", "6-5i"), ("6 - 5i", "-5i+6"),
    ("(1+2i)(1-2i)", "5"), (r"\frac{1}{i}", "-i"), (r"-2+2 \sqrt{3} i", r"-2+2i\sqrt{3}"),
    ("p - q", "p-q"), ("p - q", "-q+p"), ("x^5 - x^4 + x^3 - x^2 + x - 1", r"\frac{x^6-1}{x+1}"),
    ("x^3+3x-6", "3x + x^3 - 6"), ("8n^2 + 4n + 1", "1+4n+8n^2"), ("6r^2-4r-24", "2(3r^2-2r-12)"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"), (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"),
    ("2^{n}-n-1", "2^n - (n+1)"), ("(n-2) 2^{n}+1", "1+2^n(n-2)"), ("4^n", "2^{2n}"),
    (r"100 p^{\frac{1}{2}}", r"100\sqrt{p}"),
    (r"\frac{11+9a}{20}", r"\frac{11}{20}+\frac{9a}{20}"), (r"\frac{1}{4p^2}", r"\frac14 p^{-2}"),
    ("2RC+R+C", "R+C+2RC"), (r"288 \pi", r"288\pi"), (r"\frac{20000}{\pi}", r"20000/\pi"),
    (r"18+2\pi", r"2(\pi+9)"), (r"7\pi", r"7 \cdot \pi"), (r"1024-256 \pi", r"256(4-\pi)"),
    (r"\alpha+\beta", r"\beta + \alpha"), ("x_1+x_2", "x_{2}+x_{1}"),
    (r"\frac{v_{0}}{r_{0}} \frac{1}{\left(1+r / r_{0}\right)^{3 / 2}}",
     r"\frac{v_0}{r_0(1+r/r_0)^{3/2}}"),
    (r"\frac{e^{-2 t}}{15}+C_{1} e^{t}+C_{2} e^{-t}", r"C_1e^t+C_2e^{-t}+\frac{1}{15}e^{-2t}"),
    (r"\sqrt{2} \cos (2 t-\pi / 4)", r"\cos 2t+\sin 2t"),
    (r"2 \pi / \omega", r"\frac{2\pi}{\omega}"), ("10:30", "10:30"), ("10:30", "10 : 30"),
    ("10:30", "10{:}30"), ("3:4", "3 : 4"), ("27.0", "27"), ("025", "25"), ("27.0", "27."),
    ("27", "27.00"), ("-1.0", "-1"), ("0.15", r"\frac{3}{20}"), ("1.25", "5/4"),
    ("326.5", r"\frac{653}{2}"), (r"\frac{3}{56}", "3/56"), (r"0.\overline{3}", "1/3"),
    (r"0.1\overline{6}", r"\frac16"), (r"2021 \cdot 505 \cdot 337", "2021*505*337"),
    ("10^{100}", "10^{{100}}"), ("9!/8!", "9"), (r"\boxed{5}", "5"),
    ("x = -3", "-3"), ("a=2, b=3", "b=3, a=2"), (r"\angle ABC = 90", r"90^\circ"),
    (r"\text{Area} = 5", "5"), (r"20 \text{ miles per hour}", "20"), ("3 feet", "3 ft"),
    ("12 square units", "12"), (r"12 \text{ cubic meters}", r"12 \text{ m}^3"),
    ("-13x+3", "3-13x"), (r"\frac{x}{2}", "x/2"), (r"\frac{x}{2}", "0.5x"),
    (r"\frac{1}{2}x", r"\frac{x}{2}"), (r"\frac{2x}{3}", r"\frac23 x"), ("(x-1)(x+1)", "x^2-1"),
    ("-(n-1) / 2", r"\frac{1-n}{2}"), ("10^{3},10", "1000, 10"),
    ("10^{1/100}", r"\sqrt[100]{10}"), (r"\frac{-1+\sqrt{5}}{2}", r"\frac{\sqrt5-1}{2}"),
    (r"\frac{\log 2}{\log 2-\log 3}", r"\frac{\ln 2}{\ln 2 - \ln 3}"),
    (r"4 \pi^{2}-1", r"(2\pi-1)(2\pi+1)"), (r"90^{\circ},60^{\circ}", r"60^\circ, 90^\circ"),
    (r"(45^{\circ}, 60^{\circ})", "(45,60)"), (r"2,-\log _{10} 250", r"2, -\log_{10}(250)"),
    (r"\cos(2\pi/3)", r"-\frac12"), (r"\tan 45^\circ", r"\tan(45^{\circ})"),
    (r"\frac{d !}{2 k(d-k) !}", r"\frac{d!}{2k(d-k)!}"), (r"\frac{3 m}{2}-1", "1.5m-1"),
    (r"S = \{1,2,3\}", r"\{3,2,1\}"), (r"x\in\{1,2\}", "1,2"), ("2^{-2 / 3}, 8", "8, 2^{-2/3}"),
    (r"\frac{a b}{2}", r"\frac12 ba"), (r"\sqrt{\frac{2}{3}}", r"\frac{\sqrt{6}}{3}"),
    ("0.25", r"\frac{1}{4}"), (r"\left\lbrack 1,2\right\rbrack", "[1,2]"),
    (r"\mathbb{R}", r"\mathbb R"), (r"x \mapsto x^2", r"x\mapsto x^{2}"),
    (r"\text{The answer is } 5", r"\text{the answer is }5"),
    (r"\frac{5}{13}", r"{\frac {5} {13}}"), (r"-\frac{\pi}{6}", r"-\pi/6"),
    (r"\frac{-\pi}{6}", r"-\frac{1}{6}\pi"), ("2e^{x}", "2 e^x"), ("xe^x", "e^x x"),
    (r"\ln(2)+i\pi/3", r"\ln 2 + \frac{i\pi}{3}"), (r"3 - 4\mathrm{i}", "3-4i"),
    (r"\sqrt{-4}", "2i"), (r"1 + 2\cdot 3", "7"), ("2^{3^2}", "512"), ("-2^2", "-4"),
    ("(-2)^2", "4"), ("2^{-1}", "0.5"), ("8^{2/3}", "4"), ("|x-1|", "|1-x|"),
    (r"\left|x-1\right|", "|x-1|"), (r"\frac{1}{2},\frac{1}{3}", "1/3, 1/2"),
    ("x = 1, x = -1", r"x=\pm 1"), (r"x=\pm1", r"\pm 1"), (r"\{x \mid x>2\}", r"\{x\mid x>2\}"),
    (r"5\text{ cm}", r"5\,\text{cm}"), (r"5\,\mathrm{cm}", "5"), (r"25\%", "25 percent"),
    (r"25\text{ percent}", "25"), ("1/2", r"\frac{1}{2}."), (r"$\frac{1}{2}$.", "0.5"),
    (r"\left(\frac{1}{2},3\right)", "(0.5, 3)"), (r"\textbf{A}", "A"), (r"\text{A}", "(A)"),
    ("(A)", "A"), (r"\mathbf{(A)}", "A"), (r"\text{(A) }", "A"), ("A.", "A"),
    (r"\mathrm{A}", r"\text{A}"), ("2:3", "2 : 3"), (r"\text{Monday}", "monday"),
    (r"\text{Tuesday}.", "Tuesday"), (r"\text{no solution}", "No solution"),
    (r"\text{no solution}", r"\text{No Solution}"), (r"\text{none}", "None"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"), (r"-\frac12", "-0.5"), ("-0.5", "-.5"), ("-x^2", "-1x^2"),
    ("3x^2y", "3yx^2"), (r"2\sqrt{3}+1", r"1+\sqrt{12}"), (r"\sqrt{2}\sqrt{3}", r"\sqrt6"),
    (r"\sqrt{ab}", r"\sqrt{a}\sqrt{b}"), (r"\ln(ab)", r"\ln a+\ln b"),
    (r"\ln\frac{a}{b}", r"\ln a - \ln b"), (r"\log x^2", r"2\log x"), (r"\sqrt[4]{16}", "2"),
    (r"\sqrt[n]{2}", "2^{1/n}"), (r"\frac{x^2-1}{x-1}", "x+1"), ("(x-2)(x+3)", "x^2 + x - 6"),
    ("x(x+1)", "x^2+x"), ("x(x+1)(x+2)", "x^3+3x^2+2x"), ("n(n-1)/2", r"\frac{n(n-1)}{2}"),
    (r"\frac{n(n-1)(n-2)}{6}", r"\binom{n}{3}"), ("k(4k^2+k-1)/2", r"\frac{4k^3+k^2-k}{2}"),
    ("2^{n+1}-2", "2(2^n-1)"), ("2^{k-1}", r"\frac{2^k}{2}"), ("a^{m+n}", "a^m a^n"),
    ("e^{x+y}", "e^xe^y"), (r"\frac{\pi^2}{6}", r"\pi^2/6"),
    (r"\frac{4}{3}\pi r^3", r"\frac{4\pi r^3}{3}"), (r"\pi r^2 h", r"h\pi r^2"),
    (r"\tan\theta", r"\frac{\sin\theta}{\cos\theta}"),
    (r"\sin(2\theta)", r"2\sin\theta\cos\theta"),
    (r"\cos^2\theta - \sin^2\theta", r"\cos 2\theta"), (r"\sec x", r"\frac{1}{\cos x}"),
    (r"\arcsin(1/2)", r"\frac{\pi}{6}"), (r"\sin^{-1}(1/2)", r"\arcsin\frac12"),
    (r"x \le 3", r"3 \ge x"), (r"x\leq 3", r"x \leqslant 3"),
    (r"-2 \le x \le 5", r"5\ge x\ge -2"), (r"(-\infty, 3)", r"(-\infty,3)"),
    (r"[0, \infty)", r"[0,+\infty)"), (r"(0,1)\cup(1,2)", r"(1,2) \cup (0,1)"),
    (r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}\frac12\\0\end{pmatrix}", r"\begin{pmatrix}0.5\\0\end{pmatrix}"),
    (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]",
     r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\{1,2,3\}", r"\{3,1,2\}"), (r"\{ (1,2), (3,4) \}", "(3,4), (1,2)"),
    ("(1,2), (3,4)", r"\{(3,4),(1,2)\}"), ("12{,}345{,}678", "12345678"),
    ("12 345 678", "12345678"), ("12,345.67", "12345.67"), (r"\$1,234.50", "1234.5"),
    (r"1.5\times 10^3", "1500"), (r"1.5 \cdot 10^{3}", "1500"), ("1.5e3", "1500"),
    ("1.5*10^3", "1500"), (r"6.02 \times 10^{23}", "6.02e23"), ("10^{-3}", "0.001"),
    (r"2\frac{3}{4}", "11/4"), (r"2 \frac34", "2.75"), (r"-2\frac34", "-2.75"), ("2 3/4", "2.75"),
    (r"\frac{22}{7}", "22/7"), (r"\frac{10}{4}", "2.5"), (r"\frac{0}{5}", "0"), ("-0", "0"),
    (r"100\%", "100"), (r"30^\circ", r"30 \text{ degrees}"), (r"30^{\circ}", r"30^\circ"),
    (r"\angle A = 30^\circ", "30"), ("f(x) = x^2+1", "x^2 + 1"),
    ("f(x)=x^2", r"f(x) = x \cdot x"), ("g(x)=x^2-2x+2", "(x-1)^2+1"), ("a_n = 2n+1", "2n+1"),
    ("a_{n}=2n+1", "a_n=1+2n"), (r"S_n = \frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
    (r"y=\frac{1}{2}x+3", r"y = \frac{x}{2}+3"), (r"y=\frac{1}{2}x+3", "y=0.5x+3"),
    ("x+y=5", "y+x=5"), ("x^2+y^2=25", "x^2+y^2-25=0"), (r"x = 3 \text{ and } y = 4", "x=3, y=4"),
    ("x=3,y=4", "y=4,x=3"), ("3,4", "3 and 4"), (r"3, 4 \text{ or } 5", "3,4,5"),
    ("i", r"\mathrm{i}"), ("1+i", "i+1"), (r"e^{i\pi/3}", r"\frac12+\frac{\sqrt3}{2}i"),
    (r"\frac{1+i\sqrt{3}}{2}", r"\frac{1}{2}+\frac{\sqrt{3}}{2}i"), ("3+4i", "4i+3"),
    (r"\frac{3}{5}+\frac45 i", r"\frac{3+4i}{5}"), ("4!", "24"), (r"\frac{5!}{3!}", "20"),
    (r"\binom{10}{3}", "120"), (r"\log_{2}(8)", "3"), (r"\log_3 81", "4"),
    (r"\log_{1/2} 8", "-3"), (r"\ln(e^2)", "2"), (r"2^{\log_2 5}", "5"), ("|{-3}|", "3"),
    (r"\lvert -3\rvert", "3"), (r"\left|{-3}\right|", "3"), (r"\lfloor \pi \rfloor", "3"),
    (r"\lceil\pi\rceil", "4"), ("3.0", "3"), ("03", "3"), ("0.50", ".5"),
    (r"x^{\frac{1}{2}}", r"\sqrt{x}"), ("x^{-1}", r"\frac{1}{x}"),
    (r"x^{-\frac12}", r"\frac{1}{\sqrt{x}}"), (r"\dfrac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"),
    (r"\sqrt{\frac{1}{2}}", r"\frac{\sqrt2}{2}"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"),
    (r"\frac{1}{\sqrt{5}-2}", r"\sqrt5+2"), ("√2/2", r"\frac{\sqrt{2}}{2}"),
    ("2√3", r"\sqrt{12}"), ("√(2)", r"\sqrt2"), ("π", r"\pi"), ("2π", r"2\pi"), ("½", "0.5"),
    ("3½", "3.5"), ("x≤2", r"x\le2"), ("−5", "-5"), ("–5", "-5"), ("x³", "x^3"),
    ("[1, 2] ∪ [3, 4]", r"[1,2]\cup[3,4]"), ("θ", r"\theta"), ("α+1", r"\alpha+1"),
    ("x ∈ [1,2]", r"x\in[1,2]"), ("∅", r"\emptyset"), ("10{:}30", "10:30"),
    (r"10:30 \text{ a.m.}", r"10:30 \text{ a.m.}"), (r"10\!:\!30", "10:30"),
    (r"0.\overline{27}", "3/11"), (r"0.\overline{27}", r"0.\overline{2727}"),
    (r"\text{Yes}", "Yes"), (r"\text{yes}", "YES"), (r"\frac{a}{b}", "a/b"),
    (r"\frac{a+b}{c}", "(a+b)/c"), ("a/(b+c)", r"\frac{a}{b+c}"),
    (r"\frac{mv^2}{2}", r"\frac12 m v^2"), (r"\frac{1}{2}mv^2", r"\frac12mv^2"),
    (r"mg\sin\theta", r"m g \sin \theta"), (r"\sqrt{2gh}", r"\sqrt{2 g h}"),
    (r"\sqrt{\frac{2E}{m}}", r"\sqrt{2E/m}"), (r"4\pi\epsilon_0 r^2", r"4\pi \epsilon_{0}r^{2}"),
    (r"5 \text{ and } -5", r"\pm 5"), (r"\pm\sqrt{3}", r"\sqrt{3}, -\sqrt{3}"),
    (r"\pm 3i", "3i,-3i"), (r"\pm\frac{1}{2}", r"\frac{1}{2},-\frac{1}{2}"),
    (r"-1\pm\sqrt2", r"-1+\sqrt2,-1-\sqrt2"),
    (r"\frac{-1\pm\sqrt5}{2}", r"\frac{-1+\sqrt5}{2},\frac{-1-\sqrt5}{2}"),
    (r"(\pm 1, 2)", "(1,2),(-1,2)"), ("(1,2,3)", "(1, 2, 3)"),
    (r"\left\langle 1,2\right\rangle", r"\langle 1,2\rangle"), ("(1;2)", "(1;2)"),
    (r"5 \text{ units}", "5"), (r"5 \text{ square inches}", r"5 \text{ in}^2"),
    ("5 in", r"5 \text{ inches}"), (r"5 \text{ ft}^3", r"5 \text{ cubic feet}"),
    (r"3.2 \text{ m/s}^2", "3.2"), (r"3.2 \text{ m s}^{-1}", "3.2"),
    (r"5 \text{ hours}", "5 hours"), (r"12 \text{ people}", "12"), (r"8 \text{ ways}", "8"),
    ("5 minutes", r"5 \text{ min}"), (r"\$5.00", "5"), (r"\$5", r"\text{\$}5"),
    (r"5\text{ dollars}", r"\$5"), (r"\frac{1}{2}\%", "0.5"),
    (r"2.5\times 10^{5} \text{ J}", "2.5e5"), ("x", "x"), ("xyz", "xzy"), ("abc", "cab"),
    ("AB", "AB"), (r"\overline{AB}", r"\overline{AB}"), (r"\triangle ABC", r"\triangle ABC"),
    ("ABCD", "ABCD"), (r"\text{I and II}", r"\text{I and II}"), (r"2n\pi", r"2\pi n"),
    (r"\frac{\pi}{2}+2k\pi", r"2\pi k+\frac{\pi}{2}"),
    (r"k\pi, k\in\mathbb{Z}", r"k\pi, k \in \mathbb{Z}"), ("1:2:3", "1:2:3"),
    ("12_{10}", "12_{10}"), ("1011_2", "1011_{2}"), (r"\text{1011}_2", "1011_2"),
    ("(x+1)(x-1)=0", "x^2-1=0"),
    (r"0.\bar{3}", r"\frac13"), (r"{1 \over 2}", r"\frac12"), (r"{n+1 \choose 2}", r"\frac{n(n+1)}{2}"),
    (r"3<x\le 4", "(3,4]"), ("x>2", r"(2,\infty)"), (r"0 \ge x", r"(-\infty,0]"), (r"7 \ge x \ge -2", r"x \in [-2,7]"),
    (r"x<-1 \text{ or } x>3", r"(-\infty,-1)\cup(3,\infty)"), (r"(-\infty,\infty)", r"\mathbb{R}"),
    ("ℝ", r"\mathbb R"), ("6.72×10⁻⁵", ".0000672"), (r"2^5 3^2 \pi", r"288\pi"), (r"288 \pi cm^3", r"288 \pi"),
    (r"76 ^ \circ", r"76^\circ"), ("40_{(9)}", "40_9"), ("(40)_9", "40_9"), (r"32\ 348", "32348"),
    (r"1\text{,}000", "1000"), ("{1,2,3}", r"\{1,2,3\}"), (r"3, 5\text{, and }7", "3,5,7"),
    ("15 sq. cm", r"15\mbox{ cm}^2"), (r"864\text{ sq. in.}", r"864 \mbox{ inches}^2"), (r"5 \text{ years old}", "5"),
    ("5 children", "5"), (r"5\text{ cups}", "5"), ("5.4¢", r"5.4 \text{ cents}"), ("€18.90", r"\$18.90"),
    (r"18.90 \text{ USD}", r"\$18.90"), (r"\text{No solution.}", "no solution"), (r"\text{Sam}", "sam"),
    (r"(2,3)\text{ units}", "(2,3)"), ("I, III", r"\text{I and III}"),
    ("II only", r"\text{II only}"), ("4:30 p.m.", r"4:30 \text{ p.m.}"), (r"5\\", "5"), (r"\sin 0", "0"),
    (r"3\ne x", r"x \neq 3"), ("5=x", "5"), (r"f(x)=\pm x", "f(x)=x, f(x)=-x"),
    (r"\begin{pmatrix} \frac15 \\[4pt] 2 \end{pmatrix}", r"\begin{bmatrix} 0.2 \\\\ 2 \end{bmatrix}"),
    ("x^2+y^2-6x+8y=0", "(x-3)^2+(y+4)^2=25"), (r"\frac{x^2-4}{(x-2)(x-3)}", r"\frac{x+2}{x-3}"),
    (r"x'+\frac{r}{V}x=rc", r"x^{\prime}+\frac{r}{V} x-r c=0"), (r"16 e^{4\pi i/3}", r"-8-8 \sqrt{3} i"),
    (r"\log_4 9", r"\frac{\log 3}{\log 2}"), (r"4.5 \times 10^{33} \mathrm{~erg} \cdot \mathrm{s}^{-1}", "4.5e33"),
    (r"0.\overline{9}", "1"), ("5^{0.5}", r"\sqrt 5"), (r"\sqrt{e^{-i\pi}}", "i"), (r"1\pm 2\mp 5", "-2, 4"),
    (r"1 ^\circ000", "1000"), (r"2\frac32", "3"), (r"1\frac{x}{2x}", "1/2"), (r"2^1\frac12", "1"),
]

DIFFERENT = [
    ("5 feet 3 inches", "5"), ("5 cm - 3 cm", "5"), ("5 cm 3", "5"), ("5", "6"), ("5", "-5"),
    ("5", "5 or 6"), ("5 or 6", "5"), ("5", "50"), ("5", "0.5"), ("0.33", "1/3"),
    ("0.333333333333", "1/3"), ("3.14", r"\pi"), ("3.14159265", r"\pi"),
    ("3.141592653589793", r"\pi"), ("1.41421356", r"\sqrt{2}"), ("1.4142135624", r"\sqrt2"),
    ("1.414", r"\sqrt2"), ("0.67", r"\frac23"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2]"), ("[1,2)", "[1,2]"), ("[1,2)", "(1,2]"), ("1,2", "1"), ("1,2", "1,2,3"),
    ("1,2,2", "1,2"), (r"\{1,2\}", r"\{1,2,3\}"), ("1,2", "1,3"), ("1,000", "1"),
    ("1,000", "1,0"), ("1,000", "0,1"), ("1,000", "100"), ("1", "1,2"),
    ("100,200,300", "300,200,100"), ("100,200,300", "100,200"), ("100,200,300", "100200301"),
    ("the answer is 5", "5"), ("5 is the answer", "5"), ("about 5", "5"), ("not 5", "5"),
    ("5 or so", "5"), (r"\text{not } 5", "5"), ("x", "y"), ("x+1", "y+1"), ("x=5", "x=6"),
    ("x=5", "y=5"), ("x=5", "-5"), ("x^2", "x"), ("2x", "2"), ("2x", "x"), ("2", "2k"),
    ("x", "X"), (r"\sqrt{x^2}", "x"), ("|x|", "x"), (r"\sqrt{x^2y^2}", "xy"), ("|xy|", "xy"),
    (r"\ln(x^2)", "x"), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "1,2"), (r"50\%", "0.5"), (r"180^\circ", r"\pi"),
    (r"90^\circ", r"\frac{\pi}{2}"), (r"\text{east}", r"\text{west}"),
    (r"\text{even}", r"\text{odd}"), (r"\text{even}", r"\text{not even}"),
    (r"\text{Evelyn}", r"\text{Briana}"), (r"\text{(C)}", r"\text{(D)}"), ("C", "D"), ("A", "B"),
    ("12_5", "12_6"), ("12_5", "12"), ("12_5", "7"), ("52_8", "52"), ("52_8", "42"), ("nan", "5"),
    ("inf", "5"), ("nan", "inf"), ("nan", "0"), ("infinity", "5"), ("inf", "1e400"),
    (r"\infty", r"-\infty"), (r"\infty", "5"), (r"\infty", r"2\infty"), ("1/0", "2/0"),
    ("1/0", r"\infty"), ("1/0", "0"), ("0^0", "1"), ("0^{-1}", "0"),
    ("9^{9^{9^9}}", "9^{9^{9^8}}"), ("10^{10^{10}}", "10^{10^{11}}"), ("e^{-1000}", "0"),
    ("e^{-1000}", "e^{-2000}"), ("e^{1000}", "e^{2000}"), ("x>2", "x<2"), ("x>2", r"x\ge 2"),
    (r"x \geq 2", r"x \leq 2"), ("1<x<2", "1<x<3"), ("1<x<2", r"1\le x<2"), ("y=2x+3", "y=2x-3"),
    ("y=2x+3", "y=3x+2"), ("y=2x+3", "x=2y+3"), ("x=1,y=2", "x=2,y=1"), ("(2,3)", "2,3"),
    (r"\{1,2\}", "(1,2)"), ("[2,5)", "[2,6)"),
    (r"(-\infty,-1]\cup[1,\infty)", r"(-\infty,-1)\cup[1,\infty)"),
    (r"(-\infty,-1]\cup[1,\infty)", r"(-\infty,-1]"),
    (r"(-\infty,-1]\cup[1,\infty)", r"(-\infty,1]\cup[1,\infty)"), (r"1\pm\sqrt5", r"1+\sqrt5"),
    (r"1\pm\sqrt5", r"1\pm\sqrt6"), (r"\pm 2", "2"), (r"\pm 2", "-2"), ("2^{10}", "20"),
    ("2^{10}", "1023"), ("5!", "5"), ("5!", "121"), ("5!!", "(5!)!"), (r"\frac12", r"\frac13"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), (r"\frac12", "12"), (r"1\frac12", r"\frac{12}{2}"),
    (r"1\frac12", "0.5"), (r"1\frac12", "11/2"), ("10:30", "10:31"), ("10:30", "1/3"),
    ("3:4", "4:3"), ("3:4", "3/4"), ("6-5i", "6+5i"), ("6-5i", "-6+5i"), ("i", "1"),
    ("x+1", "x+2"), ("x^{100}+1", "x^{100}+2"), ("x^{20}+1", "x^{20}+2"),
    ("x^{2016}+1", "x^{2016}+2"), ("x+10^{-12}", "x"), ("2^{n}", "2^{n}+1"),
    ("2^{100}", "2^{100}+1"), ("10^{20}", "10^{20}+1"), ("10^{12}+i", "10^{12}+2i"),
    ("1e-27", "2e-27"), (r"6.6e-34\pi", r"1.3e-33\pi"), (r"\sin x", r"\cos x"),
    (r"\sin x", r"\sin y"), (r"\sin x", r"x\sin"), (r"\sin 2x", r"2 \sin x"),
    (r"\sin(x)^2", r"\sin(x^2)"), (r"\log_2 8", r"\log_3 8"), (r"\ln 2", r"\log 2"),
    (r"\lfloor n/2\rfloor", r"\lceil n/2\rceil"), (r"\lfloor n/2\rfloor", "1"),
    (r"\lfloor n/2\rfloor", "n/2"), (r"\lfloor n/2\rfloor", "0"), ("f(x)=2x", "f(x)=3x"),
    ("f(x)=2x", "3x"), ("f(x)=2x", "g(x)=2x"), ("I(0)", "0"), ("I(0) e^{-t}", "0"), ("f(0)", "0"),
    (r"0.\overline{3}", "0"), (r"0.\overline{3}", r"0.\overline{4}"), (r"0.\overline{3}", "0.3"),
    (r"5 \text{ cm}", r"5 \text{ m}"), (r"5 \text{ cm}^2", r"6 \text{ cm}^2"),
    (r"5 \text{ cm}^2", r"5 \text{ cm}"), ("5 cm", "6"), ("5 million", "5"),
    (r"5 \text{ million}", "5"), ("5 thousand", "5"), (r"\$5", "6"),
    (r"\$5 \text{ dollars}", r"5 \text{ cents}"), ("4=5", "5"), ("2x=10", "10"), ("x+1=5", "5"),
    ("x^2=5", "5"), ("-x = 5", "5"), ("|x|=5", "5"), ("n!=120", "120"), (r"\sin x = 1", "1"),
    ("dog", "god"), (r"\text{dog}", r"\text{god}"), ("no", "on"), ("1 2", "2"), ("1 2", "12"),
    ("1 2", "3"), ("12 3", "123"), ("", "5"), ("", ""), ("$", "$"), (r"\emptyset", "0"),
    (r"\emptyset", "5"), (r"\emptyset", r"\{0\}"), (r"\mathbb{R}", r"\mathbb{Q}"),
    (r"A \setminus B", r"B \setminus A"), (r"3 \pmod 7", r"7 \pmod 3"),
    (r"x \equiv 3 \pmod 7", r"x \equiv 4 \pmod 7"), (r"x\to 5", r"5\to x"), ("x_1", "x_2"),
    ("x_1", "x"), ("x_{12}", "x_1 2"), ("a_n", "a_m"), ("y'", "y"), ("e", "2.718281828"),
    ("e", "x"), ("e^x", "x^e"), (r"\pi", "3"), (r"\alpha", r"\beta"), (r"\theta", "t"),
    (r"\binom{5}{2}", r"\binom{5}{1}"), (r"\binom{5}{2}", "5/2"),
    (r"\binom{n}{2}", r"\binom{n}{3}"), (r"\sqrt[3]{8}", r"\sqrt{8}"),
    (r"\sqrt[3]{x}", r"\sqrt{x}"), (r"\sqrt{2}", "2"), (r"\sqrt 2", r"\sqrt 3"),
    (r"\sqrt{2}+10^{-12}", r"\sqrt2+2"), ("p-q", "q-p"), ("ab", "a+b"), ("ab", "ac"),
    (r"\frac{a}{b}", r"\frac{b}{a}"), (r"\frac{x+1}{2}", r"\frac{x}{2}+1"), ("(x+1)^2", "x^2+1"),
    ("(a+b)^2", "a^2+b^2"), ("1/(2x)", "1/2x"), ("2^{3x}", "2^3x"), ("MR=SRMC", "MR=SRAC"),
    ("SRAC=LRAC", "SRMC=LRMC"), (r"(3,\frac{\pi}{2})", r"(3,\frac{\pi}{3})"),
    ("(1,2),(3,4)", "(1,3),(2,4)"), ("(1,2),(3,4)", "(1,2)"), ("(1,2),(3,4)", "1,2,3,4"),
    ("(1,2),(3,4)", "(2,1),(4,3)"), ("1,1,2", "1,2,2"), (r"\{1\}", r"\{2\}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"), ("5^", "5"), ("5_", "5"), ("{5", "5"),
    ("(5", "5"), ("5 +", "5"), ("5 -", "5"), (r"\frac{5}", "5"), (r"\sqrt", "5"), ("5 , 5", "5"),
    ("5,5", "5"), ("5,", "6"), ("5/", "5"), ('"5"', "5"), ("5;6", "5"), ("5??", "5"),
    ("5 # 6", "5"), ("5 & 6", "5"), (r"5\\6", "5"), ("5=6", "5"), (r"5 \ne 5", "5"),
    ("5 < 6", "5"), ("x<5", "5"), ("x>5", "5"), (r"x\ne5", "5"), (r"x \to 5", "5"), ("² ", "2"),
    ("5²", "5"), ("٣", "3"), ("x^2=4", "x=2"), ("0", r"\text{zero}"), ("0x", "x"), ("1e3", "1e4"),
    ("1e999999999", "1e999999998"), ("1e999999999", "999999999e"), ("2e5", "10e"),
    ("10^{-3}", "0.01"), ("1.0", "10"), ("1,5", "1.5"), ("0,5", "0.5"), ("-1,000", "1000"),
    ("(1,000)", "1000"), ("12,34", "1234"), ("1,2345", "12345"), ("1000,000", "1000000"),
    (r"\frac{d x}{d t}=k x-a", r"\frac{d x}{d t}=k x+a"), ("$p$", "$q$"), ("True", "False"),
    ("yes", "no"), (r"\text{yes}", r"\text{no}"), (r"\infty", r"\text{undefined}"),
    (r"\text{DNE}", r"\infty"), (r"\max(1,2)", "2"), ("a^b", "b^a"), ("n!", "n"),
    ("n!", "(n+1)!"), ("(2n)!", "2n!"), ("2^n", "n^2"), (r"-\frac{1}{2}", r"\frac{1}{2}"),
    ("-(x+1)", "-x+1"), ("[1,2]", r"\{1,2\}"), ("t(0,4]", "(0,4]"), (r"\log x^2", r"(\log x)^2"),
    (r"\frac{1}{2},\frac{1}{3}", "1/3"), (r"x=\pm1", "1"),
    (r"10:30 \text{ a.m.}", r"10:30 \text{ p.m.}"), (r"\sqrt{ab}", r"\sqrt{a+b}"),
    (r"\ln(a+b)", r"\ln a+\ln b"), (r"\log(ab)", r"\log a\log b"), (r"\text{no solution}", "0"),
    (r"\text{none}", r"\emptyset 1"), (r"25\%", "0.25"), ("2,3", "23"), ("2, 3", "2.3"),
    ("1,2,3", "123"), ("(1,2),(3,4)", "(3,4)"), (r"\frac{22}{7}", r"\pi"), ("3.1416", r"\pi"),
    ("2.718", "e"), ("0.5", "0.50001"), ("0.1 + 0.2", "0.30000000000000004"), ("1e-5", "1e-6"),
    (r"x\le 3", "x<3"), (r"-2\le x\le 5", "-2<x<5"), (r"-2\le x\le 5", r"-5\le x \le 2"),
    (r"[0,\infty)", r"(0,\infty)"), ("[0,1]", "[1,0]"), (r"(0,1)\cup(1,2)", "(0,2)"),
    (r"(0,1)\cup(1,2)", "(0,1)"), (r"\{1,2,3\}", r"\{1,2,4\}"), (r"\{1,2,3\}", "1,2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "1,2,3,4"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"), ("f(x)=x^2", "x^3"), ("f(x)=x", "g(x)=x"),
    ("a_n", "a_{n+1}"), ("x+y=5", "x+y=6"), ("x+y=5", "x-y=5"), ("x=3,y=4", "x=4,y=3"),
    ("x=3,y=4", "3"), ("3+4i", "3-4i"), ("3+4i", "4+3i"), ("3+4i", "7"), ("3+4i", "5"),
    (r"e^{i\pi/3}", r"e^{-i\pi/3}"), ("4!", "4"), ("4!!", "24"),
    (r"\binom{10}{3}", r"\binom{10}{4}"), (r"\log_2 3", r"\log_3 2"), (r"\lfloor x\rfloor", "x"),
    (r"\lceil x\rceil", r"\lfloor x \rfloor"), ("x^{2n}", "x^2n"),
    (r"\frac{a}{b+c}", r"\frac{a}{b}+c"), ("a/b+c", "a/(b+c)"), (r"\sqrt{x+1}", r"\sqrt{x}+1"),
    (r"\sin x^2", r"\sin^2 x"), (r"\sin(x+y)", r"\sin x+\sin y"),
    (r"\arcsin x", r"\frac{1}{\sin x}"), (r"5 \text{ kg}", r"5 \text{ g}"),
    (r"5 \text{ km}", r"5 \text{ m}"), (r"5 \text{ hours}", r"5 \text{ minutes}"),
    (r"5 \text{ million}", r"5 \text{ billion}"), ("I", "II"), (r"\text{I and II}", r"\text{I}"),
    (r"\text{I and II}", r"\text{I and III}"), (r"\text{II only}", r"\text{I only}"),
    ("AB", "AC"), (r"\triangle ABC", r"\triangle ABD"), ("1:2:3", "3:2:1"), ("1011_2", "1011"),
    ("1011_2", "11"), ("5;6", "6;5"), ("5...6", "56"), (r"5 \cdot", "5"), (r"\cdot 5", "5"),
    ("5 =", "5"), ("= 5", "6"), ("x =", "x"), (r"\frac{1}{}", "1"), (r"\frac{}{2}", "2"),
    ("^5", "5"), (r"5 \text{(not 6)}", "6"), (r"\text{5 or 6}", "6"), ("5 (or 6)", "5"),
    ("5 (6)", "5"), ("5(6)", "56"), ("(5)(6)", "56"), (r"5 \times", "5"),
    (r"\text{approximately } 5", "5"), (r"\approx 5", "6"), (r"\sim 5", "5"), (r"5 \pm 1", "5"),
    (r"5\pm0", "5"), (r"\infty", "10^{100}"), (r"\text{infinite}", r"\text{finite}"),
    (r"\text{odd}", r"\text{even}"), (r"\text{increasing}", r"\text{decreasing}"),
    (r"\text{A}", r"\text{B}"), ("A", "a"), ("N", "n"), (r"\text{A, B}", r"\text{A}"),
    ("A,B", "A"), ("A, B, C", "A, B"), ("ABC", "A"), ("ABC", "ABD"), (r"2\frac{1}{2}", "1"),
    (r"2\frac{1}{2}", "2"), (r"2\frac12", r"\frac{21}{2}"), ("1.2.3", "1.23"), ("1,2.3", "12.3"),
    ("1..2", "1.2"), ("--5", "-5"), ("+-5", "5"), ("5--", "5"), ("5+-", "5"), ("2^-1", "2"),
    ("2^{-1}", "-2"), ("(-1)^{1/2}", "-1"), ("i^2", "1"), ("x_1", "x^1"), ("x_2", "2x"),
    ("x_{1}y", "xy"), (r"\hat{x}", "x"), (r"\vec{v}", "v"), ("x'", "x"), (r"\dot{x}", "x"),
    (r"\bar{x}", "x"), (r"\overline{AB}", "AB"), (r"\sum_{k=1}^n k", "n"), (r"\int x dx", "x"),
    (r"\int_0^1 x\,dx", "0"), (r"\lim_{x\to0} x", "0"), (r"0\cdot\text{x}", "1"),
    (r"0.\bar{3}", "0"), (r"0.\bar{3}", "0.3"), (r"0.\dot{3}", "0"), (r"0.3\ldots", "0"),
    (r"0 \ldots 5", "0"), (r"0 \text{ apples}", "5"), (r"0 \hat{5}", "5"), (r"\prod k", "k"),
    ("0f(1)", "1"), (r"\det(A)", "A"), (r"\text{det}", r"\text{dot}"), (r"\gcd(4,6)", "2,4"),
    (r"\max\{1,2\}", "1,2"), (r"\min(1,2)", "(1,2)"), (r"x\%y", "xz"),
    (r"\operatorname{lcm}(4,6)", r"\gcd(4,6)"), ("5 mod 7", "7 mod 5"),
    (r"7 \mid 5", r"5 \mid 7"), (r"\neg p", "p"), (r"p \land q", r"p \lor q"),
    (r"p \to q", r"q \to p"), (r"p\implies q", r"q\implies p"), (r"A\cap B", r"A\cup B"),
    (r"A\cup B", "A"), (r"A \times B", "A"), (r"\forall x", r"\exists x"), (r"a\ne b", "a=b"),
    (r"a \equiv b", "a = b"), ("a<b<c", "a<c<b"),
    (r"0\cdot\infty", "0"), (r"\infty-\infty", "0"), (r"\frac{\infty}{\infty}", "1"), (r"1^{\infty}", "1"),
    (r"1/\infty", "0"), ("|x|+i", "x+i"), ("|p-q|", "p-q"), ("|ac|", "ac"), (r"\sqrt[4]{x^4}", "x"), ("0=1", "2=3"),
    ("x=-2,y=1", "-2,1"), (r"\{\emptyset\}", r"\emptyset"), ("R", r"\mathbb{R}"), (r"x\ge2", r"(2,\infty)"),
    ("x<2", r"(2,\infty)"), ("y>2", "x>2"), ("-1<x<3", r"(-\infty,-1)\cup(3,\infty)"),
    ("(1,2),(3,4)", r"(1,2)\cup(3,4)"), (r"x>-1 \text{ or } x<3", r"(-\infty,-1)\cup(3,\infty)"),
    (r"(0,9)\cap(9,36)", r"(0,9)\cup(9,36)"), (r"\text{not } B", "B"), ("5 or 6 apples", "5"), ("5 less", "5"),
    ("5 times 2", "5"), ("5 million", "5000000"), ("5 dozens", "5"), ("5 squared", "5"), ("0.333...", "0.333"),
    ("5 if x>0", "5"),
    ("5 or more", "5"), ("more than 5", "5"), ("between 4 and 6", "5"), ("5 but also 6", "5"), ("x=5, y=6", "5"),
    ("either 5", "5"), (r"6.72\times 10-5", ".0000672"), ("0x204", "204"),
    (r"\pm \{1,2\}", r"\{1,2\}"), ("204 ?", "204"),
    (r"\text{AB}", r"\text{BA}"), ("{xy}", "XY"), ("12_{56}", "12_5 6"), ("3^{R^2}", "3R^2"),
    (r"\lfloor n/2\rfloor", r"\lfloor n/3\rfloor"), ("f(2x)=x", "f(x)=2x"), (r"\overline{5}", "5"),
    (r"0.4\overline{4}", "0.4"), (r"0.3\overline{3", "0.3"), (r"\{1,\{2,3\}\}", r"\{1,2,3\}"),
    (r"e^{i\pi/4}", r"e^{-i\pi/4}"), ("10^{-300}", "0"), ("Sam", "Sma"), ("25!", "25!+1"), ("|p^2-q^2|", "p^2-q^2"),
    ("|p^2-q^2|", "q^2-p^2"), ("e=5", "5"), (r"\sqrt{2}+10^{-8}", r"\sqrt2"), ("x=x", "y=y"),
    ("1,000", r"\{1,0\}"),
]


ANSWERS = sorted({text for pair in EQUAL + DIFFERENT for text in pair})


def boxed(answer):
    return f"So the answer is $\\boxed{{{answer}}}$."


def wrong_verdicts(pairs, expected):
    """Return the pairs that is_equivalent, in some order, or math_reward judges otherwise than `expected`."""
    return [(answer, gold) for answer, gold in pairs
            if is_equivalent(answer, gold) is not expected or is_equivalent(gold, answer) is not expected
            or math_reward(boxed(answer), gold) != float(expected)]


def test_the_same_value_in_another_form_is_right():
    assert wrong_verdicts(EQUAL, True) == []


def test_a_different_value_is_wrong():
    assert wrong_verdicts(DIFFERENT, False) == []


def test_every_answer_but_an_empty_one_equals_itself():
    assert [text for text in ANSWERS if is_equivalent(text, text) is not (text not in ("", "$"))] == []


def test_extract_answer_returns_the_content_of_the_last_box():
    cases = [
        (r"\boxed{5}", "5"), (r"first \boxed{4}, then \boxed{5}.", "5"), (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"), (r"\framebox{5}", "5"), (r"\fbox{4} \boxed{5}", "5"),
        (r"\boxed{5} \fbox{6}", "6"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{ x_{1} \right.}", r"\left\{ x_{1} \right."),
        (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\boxed{a\\}", r"a\\"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{}", ""),
        (r"$\boxed 5$", "5"), (r"$\boxed5.$ Done", "5."),
        ("no box", None), ("", None), (r"\boxed", None), (r"\boxed{5", None), (r"\boxed{5\}", None),
        (r"\boxed{4} but \boxed{5", None), ("boxed{5}", None), (None, None), (5, None),
    ]
    found = [(response, extract_answer(response), content) for response, content in cases]
    assert [case for case in found if case[1] != case[2]] == []


def test_math_reward_is_one_if_the_last_box_is_right():
    cases = [
        (r"\boxed{42}", 1.0), (r"\boxed{4} no, \boxed{42}", 1.0), (r"\boxed{42} no, \boxed{4}", 0.0),
        ("42", 0.0), (r"\boxed{}", 0.0), (r"\boxed{42", 0.0), (r"\boxed{42 or 43}", 0.0),
        (r"\boxed{the answer is 42}", 0.0), (r"\boxed{\boxed{42}}", 1.0),
    ]
    found = [(response, math_reward(response, "42"), expected) for response, expected in cases]
    assert [case for case in found if type(case[1]) is not float or case[1] != case[2]] == []


def test_what_is_no_string_is_never_right():
    for value in (None, 5, 5.0, ["5"], b"5", True):
        assert is_equivalent(value, "5") is False, value
        assert is_equivalent("5", value) is False, value
        assert is_equivalent(value, value) is False, value
        assert math_reward(value, "5") == 0.0, value
        assert math_reward(r"\boxed{5}", value) == 0.0, value


HOSTILE = [
    "a" * 10**6, "{" * 10**6, "}" * 10**5, r"\boxed{" * 20_000, r"\boxed{" * 20_000 + "}" * 20_000,
    r"\boxed{" + "{" * 500_000 + "}" * 500_001, r"\frac" * 20_000, "(" * 10**4 + ")" * 10**4,
    "-" * 10**4 + "5", r"\sqrt" * 10**4, "2^" * 10**4 + "2", "9" * 5000, "9^{9^{9^9}}",
    "10^{10^{10}}", "2^{100000}!", "100000000!", "899!!!", "1/0", "0^0", "0^{-1}", "nan", "inf",
    "²", "x²²", "1e999999999", "5\0" * 400, "\ud800" * 10, r"\pm1" * 20, r"\pm1," * 300,
    "-" * 990 + "7", "(" * 499 + "7" + ")" * 499, "{" * 499 + "7" + "}" * 499, r"\{" * 300,
    r"\sqrt" * 190 + "2", r"\frac" * 190, "2^" * 499 + "2", "|" * 999, "x_{" * 300, "f(" * 499,
    "1 " * 499, "1," * 499, "<".join("x" * 400), r"\cup ".join([r"\{1,2\}"] * 70), "1e9999+" * 130,
    "+".join(f"1/{k}" for k in range(3, 193)), "+".join(f"x^{{{k}}}" for k in range(120)),
    "+".join(f"(2^{{2000}}/3^{{{k}}})" for k in range(1000, 1055)), "+".join(["899!"] * 190),
    "*".join(["(1+1/7)^{2000}"] * 60), r"0.\overline{" + "3" * 900 + "}", r"\text{" * 160,
    r"1\frac{" * 18 + "x" + "}{1}" * 18, "f(" * 18 + "x" + r"\pm1)" * 18,
    r"\{" * 18 + "x" + r"\}=\pm1" * 18, r"10^{400}=\sqrt{2}", r"0.\overline{", r"\frac.5",
    r"\begin{pmatrix}" * 60, "5e+", "5\\", r"0.\overline{3", "⁻" * 400, r"\lfloor x!" * 100,
    "3^{5000000}",
]


SLOW = 0.2    # seconds: four times what the slowest takes, for a machine that is busy; a blow-up takes far longer


def cpu_seconds(call):
    """Return the CPU time of a call with nothing cached: the least of up to three."""
    seconds = []
    while len(seconds) < 3 and (not seconds or min(seconds) > SLOW):
        reward._tokens.cache_clear()
        reward._value.cache_clear()
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_hostile_input_is_fast_and_raises_nothing():
    failures = []
    for number, text in enumerate(HOSTILE):
        calls = {
            "against 5": lambda: is_equivalent(text, "5"), "against x+1": lambda: is_equivalent("x+1", text),
            "against itself and 0": lambda: is_equivalent("0+" + text, text),
            "against itself": lambda: is_equivalent(text, text),
            "in a box": lambda: math_reward("\\boxed{" + text + "}", "5"), "bare": lambda: math_reward(text, "5"),
        }
        failures += [(number, text[:60], name, seconds) for name, call in calls.items()
                     if (seconds := cpu_seconds(call)) >= SLOW]
        if is_equivalent(text + "6", "5") or not is_equivalent(text, text):
            failures.append((number, text[:60], "verdict"))
    assert failures == []


def test_a_caller_near_the_recursion_limit_gets_an_answer():
    def call_at_depth(depth):
        if depth:
            return call_at_depth(depth - 1)
        reward._tokens.cache_clear()
        reward._value.cache_clear()
        return [is_equivalent(r"\frac{\{1,(x+1)^2\}}{2}", "5"), math_reward(r"\boxed{5}", "6")]

    results = []
    for depth in range(sys.getrecursionlimit() + 50):  # until not even the test itself can go deeper
        try:
            results.append(call_at_depth(depth))
        except RecursionError as error:
            traceback = error.__traceback__
            while traceback.tb_next:
                traceback = traceback.tb_next
            if traceback.tb_frame.f_code.co_name == "call_at_depth":
                break
            raise
    assert results and all(result == [False, 0.0] for result in results)


def random_expression(rng, depth):
    """Return two spellings of one random rational expression, and its value."""
    if depth == 0 or rng.random() < 0.2:
        number = rng.randint(0, 12)
        style = rng.randrange(4)
        if style == 0:
            decimal = Fraction(rng.randint(0, 999), 100)
            return f"{float(decimal):.2f}", f"{float(decimal):.3f}", decimal
        if style == 1:
            return f"\\frac{{{number}}}{{7}}", f"({number}/7)", Fraction(number, 7)
        return str(number), f"{{{number}}}", Fraction(number)
    a, a2, x = random_expression(rng, depth - 1)
    b, b2, y = random_expression(rng, depth - 1)
    operation = rng.randrange(6)
    if operation == 0:
        return f"({a}+{b})", f"\\left({b2} + {a2}\\right)", x + y
    if operation == 1:
        return f"({a}-{b})", f"(-{{{b2}}}+{a2})", x - y
    if operation == 2:
        return f"({a})({b})", f"{{{b2}}} \\cdot {{{a2}}}", x * y
    if operation == 3 and y:
        return f"\\frac{{{a}}}{{{b}}}", f"({a2})/({b2})", x / y
    if operation == 4:
        return f"({a})^2", f"{{({a2})}}^{{2}}", x**2
    return f"-({a})", f"(-1) \\times ({a2})", -x


def test_arithmetic_agrees_with_an_exact_oracle():
    rng, failures = random.Random(0), []
    for _ in range(3000):
        first, second, value = random_expression(rng, 3)
        third, _, other = random_expression(rng, 2)
        result = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
        wrong = f"{value.numerator + 1}/{value.denominator}"
        cases = (first, second, True), (second, result, True), (first, wrong, False), (first, third, value == other)
        failures += [case for case in cases if is_equivalent(*case[:2]) is not case[2]]
    assert failures == []


def test_comparisons_of_damaged_text_are_symmetric_and_reflexive():
    rng, failures = random.Random(1), []
    texts = [text for pair in EQUAL + DIFFERENT for text in pair]
    pieces = list("0123456789+-*/^_(){}[]|,.=<>!xyei'& ") + [
        "\\frac", "\\sqrt", "\\pm", "\\cup", "\\{", "\\}", "\\\\", "\\text{", "\\sin", "^{", "²"]
    for _ in range(5000):
        first = second = rng.choice(texts)
        for _ in range(rng.randint(1, 4)):
            start = rng.randint(0, len(second))
            second = second[:start] + rng.choice(pieces) + second[start + rng.randint(0, 2):]
        if is_equivalent(first, second) is not is_equivalent(second, first):
            failures.append((first, second))
        if any(char.isdigit() for char in second) and not is_equivalent(second, second):
            failures.append((second, second))
    assert failures == []
